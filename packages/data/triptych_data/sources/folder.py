"""Folders of media: with a `metadata` file as Hugging Face's imagefolder, or `a.jpg` + `a.txt`."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from triptych_data.sources.jsons import JsonRows, open_jsonl
from triptych_data.sources.members import MEDIA, holds_text, split_name, to_row
from triptych_data.sources.source import Reopened, Row, Source

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
FILE = "file_name"


@dataclass(frozen=True)
class DescribedRows(Reopened):
    """Rows of a metadata file: `file_name` becomes the column `image`, `video` or `audio`."""

    rows: Source

    @property
    def root(self) -> Path:
        return self.rows.root

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, row: int) -> str:
        return self.rows.where(row)

    def read(self, row: int) -> Row:
        values: Row = {}
        for column, value in self.rows.read(row).items():
            name, plural = column.removesuffix("s"), column.endswith("s")
            if not name.endswith(FILE):
                values[column] = value
                continue
            files = _names(value, f"{self.where(row)}: {column}")
            prefix = name.removesuffix(FILE).removesuffix("_")
            values[prefix or _kind(files[0])] = files if plural else files[0]
        return values

    def pieces(self) -> np.ndarray | None:
        return self.rows.pieces()


@dataclass(frozen=True)
class PairedRows(Reopened):
    """Files with one stem; `rows` lists each group's names relative to `folder`."""

    folder: Path
    rows: JsonRows

    @property
    def root(self) -> Path:
        return self.folder

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, row: int) -> str:
        return str(self.folder / self.rows.read(row)["files"][0])

    def read(self, row: int) -> Row:
        where, parts = self.where(row), list[tuple[str, Any, bytes | None]]()
        for name in self.rows.read(row)["files"]:
            named = split_name(name)
            assert named, "only such were listed"
            text = (self.folder / name).read_bytes() if holds_text(named[1]) else None
            parts.append((named[1], {"bytes": None, "path": name}, text))
        return to_row(parts, where)

    def pieces(self) -> np.ndarray | None:
        return None


def metadata_files(folder: Path) -> list[Path]:
    """All metadata files under `folder`, sorted; an imagefolder may have one in each subfolder."""
    return sorted(path for name in METADATA for path in folder.rglob(name))


def open_pairs(folder: Path, scratch: Path) -> PairedRows:
    """Media with a text or JSON file of the same stem beside them, sorted by path.

    Raises ValueError when there is no such pair.
    """
    listing = scratch.with_name(scratch.name + ".jsonl")
    if not listing.exists():
        temporary = listing.with_name(listing.name + ".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            for names in _pairs(folder):
                file.write(json.dumps({"files": names}) + "\n")
        if not temporary.stat().st_size:
            raise ValueError(
                f"{folder}: a folder must hold shards, tables, metadata.jsonl or metadata.csv, or "
                "media with texts such as a.jpg and a.txt, got none; name a file of it"
            )
        temporary.replace(listing)
    return PairedRows(folder, open_jsonl(listing, listing))


def _pairs(folder: Path) -> Iterator[list[str]]:
    names = []
    for place, folders, files in os.walk(folder):  # links to folders are not followed
        folders.sort()
        inside = Path(place).relative_to(folder)
        for file in files:
            name = (inside / file).as_posix()
            named = split_name(name)
            if named and (named[1] in MEDIA or holds_text(named[1])):
                names.append((named[0], name))
    for _, group in groupby(sorted(names), key=lambda pair: pair[0]):
        files = [name for _, name in group]
        kinds = {name.rpartition(".")[2].lower() in MEDIA for name in files}
        if kinds == {True, False}:
            yield files


def _names(value: Any, where: str) -> list[str]:
    files = value if isinstance(value, list) else [value]
    if not files or not all(isinstance(name, str) and name for name in files):
        raise ValueError(f"{where} must name a file, got {repr(value)[:80]}; add its name")
    return files


def _kind(name: str) -> str:
    return MEDIA.get(name.rpartition(".")[2].lower(), "image")
