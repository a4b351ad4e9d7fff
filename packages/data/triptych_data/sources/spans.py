"""Records of text files by byte span: found once, kept as a table that workers map."""

import bz2
import gzip
import lzma
import mmap
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from triptych_data.sources.source import RECORD_LIMIT, Reopened

COMPRESSED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
MOST_GROWTH = 200
"""How many times as large as its file a text may be, beyond GROWTH_FREE: text has 3 to 50."""
GROWTH_FREE = 64 << 20
Span = tuple[int, int, int]
"""(number as an error names it, first byte, byte after the last)."""


@dataclass(frozen=True)
class Spans(Reopened):
    """The records of `text`; `path` is the user's file, which may be its compressed form."""

    path: Path
    text: Path
    table: Path

    @cached_property
    def spans(self) -> np.ndarray:
        """(N, 3) int64 of `Span`, mapped from `table`; a plain view, as memmap's rows are slow."""
        return np.asarray(np.load(self.table, mmap_mode="r"))

    @cached_property
    def _file(self) -> BinaryIO:
        return self.text.open("rb", buffering=0)

    def number(self, row: int) -> int:
        return self.spans.item(row, 0)

    def bytes(self, row: int, where: str) -> bytes:
        """The bytes of a record. Raises ValueError for one over RECORD_LIMIT."""
        start, end = self.spans.item(row, 1), self.spans.item(row, 2)
        if end - start > RECORD_LIMIT:
            raise ValueError(
                f"{where}: a record must have at most {RECORD_LIMIT} bytes, got {end - start}; "
                "keep media in files beside it, or check that the file is of this kind"
            )
        return os.pread(self._file.fileno(), end - start, start)


def find_spans(
    path: Path, scratch: Path, scan: Callable[[mmap.mmap, Path], Iterable[Span]]
) -> Spans:
    """The records that `scan` finds in `path`, decompressed into `scratch` where necessary.

    What lies in `scratch` of an earlier run over the same file is used again. Raises ValueError
    for a file that does not decompress or holds no record.
    """
    text = _decompressed(path, scratch) if path.suffix in COMPRESSED else path
    table = scratch.with_name(scratch.name + ".npy")
    if not table.exists():
        spans = np.fromiter(_scan(text, path, scan), dtype=np.dtype((np.int64, 3)))
        if not len(spans):
            raise ValueError(f"{path}: the input must hold a record, got none; check the file")
        temporary = table.with_name(table.name + ".tmp")
        with temporary.open("wb") as file:
            np.save(file, spans)
        temporary.replace(table)
    return Spans(path, text, table)


def lines(data: mmap.mmap, path: Path) -> Iterator[Span]:
    """Lines that are not blank, numbered from 1 as an editor does."""
    start, number = 0, 0
    while start < len(data):
        number += 1
        end = data.find(b"\n", start) + 1 or len(data)
        if end - start > 256 or not data[start:end].isspace():
            yield number, start, end
        start = end


def _scan(
    text: Path, path: Path, scan: Callable[[mmap.mmap, Path], Iterable[Span]]
) -> Iterator[Span]:
    with text.open("rb") as file:
        if os.fstat(file.fileno()).st_size:  # nothing to map in an empty file
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                yield from scan(data, path)


def _decompressed(path: Path, scratch: Path) -> Path:
    text = scratch.with_name(scratch.name + ".text")
    if text.exists():
        return text
    temporary = text.with_name(text.name + ".tmp")
    try:
        with COMPRESSED[path.suffix](path, "rb") as packed, temporary.open("wb") as file:
            most = GROWTH_FREE + MOST_GROWTH * path.stat().st_size
            while chunk := packed.read(1 << 20):
                if file.tell() + len(chunk) > most:
                    raise ValueError(
                        f"{path}: must unpack to at most {MOST_GROWTH} times its size, got over "
                        f"{most} bytes; unpack it yourself if you trust it"
                    )
                file.write(chunk)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{path}: must be a whole {path.suffix[1:]} file, got {error}; fetch it again"
        ) from error
    temporary.replace(text)
    return text
