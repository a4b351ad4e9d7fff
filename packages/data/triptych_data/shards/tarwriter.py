"""One shard on its way to the disk: samples appended, its index beside it, then its name."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np

from triptych_data.media.probe import MediaInfo
from triptych_data.shards.index import (
    IndexRows,
    Layout,
    ShardIndex,
    checksum,
    read_index,
    write_index,
)
from triptych_data.shards.tar import BLOCK, END, header, padded

MOST_BYTES = 8**11 - 1
"""Of one member: what the eleven octal digits of a ustar header can say."""


class TarWriter:
    """Appends samples to a new tar; `finish` brings it to the disk, names it and indexes it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.end = 0
        self._temporary = path.with_name(path.name + ".tmp")
        self._rows = IndexRows()
        self._file: BinaryIO = self._temporary.open("wb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(
        self, key: str, json: bytes, media: list[bytes], measures: list[MediaInfo], text_bytes: int
    ) -> None:
        """Append a chat; media and measures in the order of the media's numbers."""
        suffixes = ["json", *(info.suffix for info in measures)]
        self.add_members(key, chat_names(suffixes), suffixes, [json, *media], measures, text_bytes)

    def add_members(
        self,
        key: str,
        names: list[str],
        suffixes: list[str],
        contents: Sequence[bytes | memoryview],
        measures: list[MediaInfo],
        text_bytes: int,
    ) -> None:
        """Append a sample of any members: what follows the key in their names, and suffixes."""
        parts, members, offset = [], [], self.end
        for name, suffix, data in zip(names, suffixes, contents, strict=True):
            head = header(f"{key}.{name}", len(data))
            parts += [head, data, bytes(padded(len(data)) - len(data))]
            members.append((offset + len(head), len(data), suffix))
            offset += len(head) + padded(len(data))
        self.add_span(key, b"".join(parts), members, measures, text_bytes)

    def add_span(
        self,
        key: str,
        span: bytes,
        members: list[tuple[int, int, str]],
        measures: list[MediaInfo],
        text_bytes: int,
    ) -> None:
        """Append a sample's headers and contents as they are; members as in `IndexRows.add`."""
        self._rows.add(key, span, members, text_bytes, measures, self.end)
        self._file.write(span)
        self.end += len(span)

    def finish(self, layout: Layout = "chat") -> ShardIndex:
        """End the tar. It has its name only when all of it is on the disk."""
        self._file.write(END)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        index = self._rows.finish(self.end, self.end + len(END), layout=layout)
        self._temporary.replace(self.path)
        write_index(self.path, index)
        return index


def chat_names(suffixes: list[str]) -> list[str]:
    """What follows the key in the names of a chat's members: "json", "0.jpg", "1.mp4", …"""
    return ["json", *(f"{i}.{suffix}" for i, suffix in enumerate(suffixes[1:]))]


def span_bytes(sizes: list[int]) -> int:
    """Bytes that a sample with members of `sizes` bytes takes in a tar."""
    return sum(BLOCK + padded(size) for size in sizes)


def cut(sizes: np.ndarray, shard_size: int, samples_per_shard: int | None) -> np.ndarray:
    """Where shards of samples of `sizes (N,)` begin, and N: a pure function of the sizes.

    A shard is full when the next sample would take it beyond `shard_size` bytes, or at
    `samples_per_shard`; a larger sample gets a shard of its own.
    """
    ends = np.concatenate([[0], np.cumsum(sizes)])
    starts = [0]
    while starts[-1] < len(sizes):
        first = starts[-1]
        bound = ends[first] + shard_size - len(END)
        last = max(first + 1, int(np.searchsorted(ends, bound, side="right")) - 1)
        starts.append(min(last, first + samples_per_shard) if samples_per_shard else last)
    return np.array(starts, dtype=np.int64)


def kept_index(
    path: Path, sizes: np.ndarray, key: Callable[[int], str] | None = None
) -> ShardIndex | None:
    """The index of a shard that an earlier run finished, if it is what would be written now.

    Its samples must have `sizes (n,)` bytes, the keys `key(0)`, `key(1)` …, and every byte of them
    the checksum of the index.
    """
    try:
        index = read_index(path)
    except ValueError:
        return None
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    if not np.array_equal(index.sample_start, offsets):
        return None
    if key and any(index.key(row) != key(row) for row in range(index.num_samples)):
        return None
    with path.open("rb") as file:
        sound = all(
            checksum(file.read(size)) == expected
            for size, expected in zip(sizes.tolist(), index.sample_hash.tolist(), strict=True)
        )
        return index if sound and file.read() == END else None
