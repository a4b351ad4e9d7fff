"""WebDataset tars made elsewhere: `a.jpg` + `a.txt`, `a.mp4` + `a.json`, in their own order."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from triptych_data.shards.scan import MOST_MEMBERS
from triptych_data.shards.tar import Member, walk
from triptych_data.sources.members import split_name, to_row
from triptych_data.sources.source import Reopened, Row


@dataclass(frozen=True)
class TarRows(Reopened):
    """The samples of one tar; `table` holds (N,) int64, the offset of each one's first header."""

    path: Path
    table: Path

    @property
    def root(self) -> Path:
        return self.path.parent

    def __len__(self) -> int:
        return len(self._starts)

    def where(self, row: int) -> str:
        return f"{self.path}: sample {self._members(row)[0][0]}"

    def read(self, row: int) -> Row:
        key, members = self._members(row)
        parts = []
        for suffixes, member in members:
            content = os.pread(self._file.fileno(), member.size, member.data)
            parts.append((suffixes, content, content))
        return {"__key__": key, **to_row(parts, f"{self.path}: sample {key}")}

    def pieces(self) -> np.ndarray | None:
        return None

    def _members(self, row: int) -> tuple[str, list[tuple[str, Member]]]:
        key, members = next(_samples(walk(self.path, int(self._starts[row])), self.path))
        return key, [(suffixes, member) for _, suffixes, member in members]

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.load(self.table, mmap_mode="r")

    @cached_property
    def _file(self) -> BinaryIO:
        return self.path.open("rb", buffering=0)


def open_tar(path: Path, scratch: Path) -> TarRows:
    """Raises ValueError for a damaged tar, one without samples, and a key that comes back."""
    table = scratch.with_name(scratch.name + ".npy")
    if not table.exists():
        starts, seen = [], set[str]()
        for key, members in _samples(walk(path), path):
            if key in seen:
                raise ValueError(
                    f"{path}: byte {members[0][2].start}: members of one sample must lie side by "
                    f"side, got {key!r} again after other samples; write the tar sorted by key"
                )
            seen.add(key)
            starts.append(members[0][2].start)
        if not starts:
            raise ValueError(f"{path}: the tar must hold a sample, got none; leave the file out")
        temporary = table.with_name(table.name + ".tmp")
        with temporary.open("wb") as file:
            np.save(file, np.array(starts, dtype=np.int64))
        temporary.replace(table)
    return TarRows(path, table)


def _samples(
    members: Iterator[Member], path: Path
) -> Iterator[tuple[str, list[tuple[str, str, Member]]]]:
    """Neighbours of one key: (key, suffixes, member) each."""
    named = ((*name, member) for member in members if (name := split_name(member.name)) is not None)
    for key, group in groupby(named, key=lambda part: part[0]):
        parts = list(islice(group, MOST_MEMBERS + 1))
        if len(parts) > MOST_MEMBERS:
            raise ValueError(
                f"{path}: byte {parts[0][2].start}: a sample must have at most {MOST_MEMBERS} "
                f"members, got more of key {key!r}; split it"
            )
        yield key, parts
