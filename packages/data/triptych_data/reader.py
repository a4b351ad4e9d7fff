"""Random access to samples in shards: one `pread` each, checked against the index."""

import functools
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from triptych_data.index import MediaColumns, ShardIndex, read_index
from triptych_data.sample import RawSample

OPEN_FILES = 64
"""Shards kept open per process: far below any ulimit, enough for several packs at once."""


@dataclass(frozen=True)
class Shards:
    """A list of indexed shards read as one sequence of N samples with K media.

    Reading is stateless and so safe in threads and after fork; a pickled copy opens files anew.
    """

    paths: tuple[Path, ...]
    indexes: tuple[ShardIndex, ...]
    fingerprint: str
    """sha256 over the indexes in order, in hex"""
    sample_start: np.ndarray
    """(number of shards + 1,) int64, the global number of each shard's first sample"""
    text_bytes: np.ndarray
    """(N,) int64"""
    media: MediaColumns
    """what the K media measure, in the order the texts meet them"""
    media_start: np.ndarray
    """(N + 1,) int64: sample i has the media media_start[i] to media_start[i + 1]"""
    _open: Any = field(repr=False, compare=False)

    @classmethod
    def open(cls, paths: Sequence[str | Path]) -> Self:
        """Shards named by files, directories (their `*.tar`) and globs.

        Arguments keep their order, what one of them finds is sorted, a file named twice counts
        once. Raises ValueError when an argument finds nothing or an index is missing or damaged.
        """
        tars = find_shards(paths)
        return cls._from(tuple(tars), tuple(read_index(tar) for tar in tars))

    @classmethod
    def _from(cls, paths: tuple[Path, ...], indexes: tuple[ShardIndex, ...]) -> Self:
        media = MediaColumns.joined([index.media for index in indexes])
        first = np.cumsum([0, *(len(index.media_kind) for index in indexes)])
        starts = [i.media_start[:-1] + at for i, at in zip(indexes, first, strict=False)]
        digest = hashlib.sha256("".join(index.fingerprint for index in indexes).encode())
        return cls(
            paths=paths,
            indexes=indexes,
            fingerprint=digest.hexdigest(),
            sample_start=np.cumsum([0, *(index.num_samples for index in indexes)]),
            text_bytes=np.concatenate([index.text_bytes for index in indexes]),
            media=media,
            media_start=np.concatenate([*starts, first[-1:]]),
            _open=functools.lru_cache(maxsize=OPEN_FILES)(_OpenFile),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self)._from, (self.paths, self.indexes)

    @property
    def num_samples(self) -> int:
        return len(self.text_bytes)

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[RawSample]:
        """All samples in order."""
        return map(self.read, range(self.num_samples))

    def media_of(self, sample: int) -> MediaColumns:
        """What the media of sample `sample` measure, in the order in which its text meets them."""
        return self.media.rows(*self.media_start[sample : sample + 2].tolist())

    def keys(self, sample: int) -> str:
        """The key of sample `sample`: unique in its shard, and over all shards of one writer."""
        shard, row = self._locate(sample)
        return self.indexes[shard].key(row)

    def where(self, sample: int) -> str:
        """What error messages about sample `sample` begin with: its shard and key."""
        shard, row = self._locate(sample)
        return f"{self.paths[shard]}: sample {self.indexes[shard].key(row)}"

    def read(self, sample: int) -> RawSample:
        """The bytes of sample `sample`, its JSON parsed, its media in the order of their numbers.

        Raises ValueError naming shard and key when the bytes are not those that were indexed.
        """
        shard, row = self._locate(sample)
        index = self.indexes[shard]
        start, end = map(int, index.sample_start[row : row + 2])
        span = self._pread(shard, row, start, end - start, int(index.sample_crc32[row]))
        first, last = index.member_start[row : row + 2]
        begins = (index.member_offset[first:last] - start).tolist()
        sizes = index.member_size[first:last].tolist()
        contents = [span[b : b + size] for b, size in zip(begins, sizes, strict=True)]
        record = json.loads(contents[0])
        return RawSample(index.key(row), self.where(sample), record, contents[1:])

    def read_json(self, sample: int) -> dict[str, Any]:
        """The JSON of sample `sample` without its media: for measuring texts. Raises as `read`."""
        shard, row = self._locate(sample)
        index = self.indexes[shard]
        member = int(index.member_start[row])
        offset, size = int(index.member_offset[member]), int(index.member_size[member])
        return json.loads(self._pread(shard, row, offset, size, int(index.json_crc32[row])))

    def _locate(self, sample: int) -> tuple[int, int]:
        """The shard that holds sample `sample`, and its row there."""
        if not 0 <= sample < self.num_samples:
            raise IndexError(f"sample must be in [0, {self.num_samples}), got {sample}")
        shard = int(np.searchsorted(self.sample_start, sample, side="right")) - 1
        return shard, sample - int(self.sample_start[shard])

    def _pread(self, shard: int, row: int, offset: int, size: int, crc32: int) -> bytes:
        path = self.paths[shard]
        file = self._open(path)  # holding it keeps it open, even if the cache drops it meanwhile
        data = os.pread(file.fd, size, offset)
        if zlib.crc32(data) != crc32:
            raise ValueError(
                f"{path}: sample {self.indexes[shard].key(row)}: the {size} bytes from {offset} "
                f"must be those that were indexed, got {len(data)} bytes of another checksum; "
                "the shard is damaged or was replaced: restore it"
            )
        return data


def find_shards(paths: Sequence[str | Path]) -> list[Path]:
    """The tar files that files, directories and globs name, as `Shards.open` orders them."""
    if isinstance(paths, str | Path):
        paths = [paths]
    found: dict[Path, Path] = {}
    for path in paths:
        tars = _expand(Path(path))
        if not tars:
            raise ValueError(
                f"{path}: must be a shard, a folder with *.tar or a glob, got nothing there; "
                "check the path, or write shards with: triptych-data shard"
            )
        for tar in tars:
            found.setdefault(tar.resolve(), tar)
    if not found:
        raise ValueError("shards: must name at least one shard, got none; add a folder or file")
    return list(found.values())


def _expand(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(path.glob("*.tar"))
    if path.is_file():
        return [path]
    anchor = Path(path.anchor or ".")
    matches = anchor.glob(str(path.relative_to(path.anchor)))
    return sorted(match for match in matches if match.suffix == ".tar" and match.is_file())


class _OpenFile:
    """A descriptor that closes when its last user, the cache or a thread in `pread`, lets go."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)
