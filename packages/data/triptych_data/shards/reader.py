"""Random access to samples in shards: one read each, checked against the index."""

import functools
import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from triptych_data.sample import RawSample, load_json
from triptych_data.shards.index import MediaColumns, ShardIndex, checksum, read_index
from triptych_data.shards.locate import find_shards
from triptych_data.storage.open import File, Location, Storage, in_parallel
from triptych_data.storage.remote import shown

OPEN_FILES = 64
"""Shards kept open per process: far below any ulimit, enough for several packs at once."""
STRETCH = 1 << 20
"""Bytes read at once in a pass over a shard: stays in a core's cache until it is used."""


@dataclass(frozen=True)
class Shards:
    """A list of indexed shards read as one sequence of N samples with K media.

    Reading is stateless and so safe in threads and after fork; a pickled copy opens files anew.
    """

    paths: tuple[Location, ...]
    """local shards as Path, remote ones as str"""
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
    storage: Storage
    _open: Any = field(repr=False, compare=False)
    _starts: list[int] = field(repr=False, compare=False)

    @classmethod
    def open(cls, paths: str | Path | Sequence[str | Path], storage: Storage | None = None) -> Self:
        """Shards named by files, directories (their `*.tar`), globs, brace ranges and URLs.

        Arguments keep their order, what one of them finds is sorted, a file named twice counts
        once. Raises ValueError when an argument finds nothing or an index is missing or damaged,
        ConnectionError when a server does not answer.
        """
        storage = storage or Storage()
        tars = find_shards(paths)
        remote = any(isinstance(tar, str) for tar in tars)
        indexes = in_parallel(functools.partial(read_index, storage=storage), tars, remote)
        return cls._from(tuple(tars), tuple(indexes), storage)

    @classmethod
    def _from(
        cls, paths: tuple[Location, ...], indexes: tuple[ShardIndex, ...], storage: Storage
    ) -> Self:
        media = MediaColumns.joined([index.media for index in indexes])
        first = np.cumsum([0, *(len(index.media_kind) for index in indexes)])
        starts = [i.media_start[:-1] + at for i, at in zip(indexes, first, strict=False)]
        digest = hashlib.sha256("".join(index.fingerprint for index in indexes).encode())

        def opener(shard: int) -> File:
            return storage.open(paths[shard], indexes[shard].tar_bytes, indexes[shard].fingerprint)

        sample_start = np.cumsum([0, *(index.num_samples for index in indexes)])
        return cls(
            paths=paths,
            indexes=indexes,
            fingerprint=digest.hexdigest(),
            sample_start=sample_start,
            text_bytes=np.concatenate([index.text_bytes for index in indexes]),
            media=media,
            media_start=np.concatenate([*starts, first[-1:]]),
            storage=storage,
            _open=functools.lru_cache(maxsize=OPEN_FILES)(opener),
            _starts=sample_start.tolist(),
        )

    @classmethod
    def joined(cls, parts: Sequence["Shards"]) -> Self:
        """Several lists of shards one after the other; a shard of two lists counts twice."""
        paths = tuple(path for part in parts for path in part.paths)
        indexes = tuple(index for part in parts for index in part.indexes)
        return cls._from(paths, indexes, parts[0].storage)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self)._from, (self.paths, self.indexes, self.storage)

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
        return self._where(*self._locate(sample))

    def read(self, sample: int) -> RawSample:
        """The bytes of sample `sample`, its JSON parsed, its media in the order of their numbers.

        Raises ValueError naming shard and key when the bytes are not those that were indexed, or
        the shard holds no chats; ConnectionError when a server does not answer.
        """
        shard, row = self._locate(sample)
        key = self.indexes[shard].key(row)
        where = f"{self._name(shard)}: sample {key}"
        if self.indexes[shard].layout != "chat":
            raise ValueError(
                f"{where}: must be a chat to be read as a sample, got other members; make chats of "
                "them with: triptych-data shard"
            )
        text, *media = map(bytes, self._members(shard, row))
        return RawSample(key, where, load_json(text, where), media)

    def read_members(self, sample: int) -> list[memoryview]:
        """The contents of a sample's members, in the order of the index, as they are.

        `indexes[…].names` has their suffixes. Raises as `read`.
        """
        return self._members(*self._locate(sample))

    def members(self) -> Iterator[list[memoryview]]:
        """`read_members` of all samples in order, in half the time: for whole passes."""
        for shard, index in enumerate(self.indexes):
            hashes, first = index.sample_hash.tolist(), index.member_start.tolist()
            offsets, sizes = index.member_offset.tolist(), index.member_size.tolist()
            for row, start, span in spans(self._open(shard), index):
                if checksum(span) != hashes[row]:
                    found = self._checked(shard, row, start, len(span), hashes[row])
                    span = memoryview(found)
                rows = range(first[row], first[row + 1])
                yield [span[(at := offsets[i] - start) : at + sizes[i]] for i in rows]

    def read_span(self, sample: int) -> bytes:
        """A sample as it lies in its tar, from its first header to the end. Raises as `read`."""
        shard, row = self._locate(sample)
        index = self.indexes[shard]
        start, end = index.sample_start.item(row), index.sample_start.item(row + 1)
        return bytes(self._checked(shard, row, start, end - start, index.sample_hash.item(row)))

    def read_json(self, sample: int) -> dict[str, Any]:
        """The JSON of sample `sample` without its media: for measuring texts. Raises as `read`."""
        shard, row = self._locate(sample)
        index = self.indexes[shard]
        member = index.member_start.item(row)
        offset, size = index.member_offset.item(member), index.member_size.item(member)
        text = bytes(self._checked(shard, row, offset, size, index.json_hash.item(row)))
        record: dict[str, Any] = load_json(text, self._where(shard, row))
        return record

    def warm(self, samples: Iterable[int]) -> None:
        """Bring what these samples need into the cache, many at once; local ones need nothing.

        Reading them one after the other would wait for one request after the other. Raises
        ConnectionError; what else is wrong with a sample is for reading it to say.
        """

        def fetch(spot: tuple[int, int]) -> None:
            with suppress(ValueError):
                self._members(*spot)

        spots = [spot for spot in map(self._locate, samples) if self._is_remote(spot[0])]
        in_parallel(fetch, spots, remote=bool(spots))

    def _members(self, shard: int, row: int) -> list[memoryview]:
        index = self.indexes[shard]  # `item` takes 50 ns where numpy's other ways take 200
        start, end = index.sample_start.item(row), index.sample_start.item(row + 1)
        span = self._open(shard).read(start, end - start)
        if checksum(span) != index.sample_hash.item(row):
            span = self._checked(shard, row, start, end - start, index.sample_hash.item(row))
        view, members = memoryview(span), []
        for member in range(index.member_start.item(row), index.member_start.item(row + 1)):
            offset = index.member_offset.item(member) - start
            members.append(view[offset : offset + index.member_size.item(member)])
        return members

    def _locate(self, sample: int) -> tuple[int, int]:
        """The shard that holds sample `sample`, and its row there."""
        if not 0 <= sample < self._starts[-1]:
            raise IndexError(f"sample must be in [0, {self.num_samples}), got {sample}")
        shard = bisect_right(self._starts, sample) - 1
        return shard, int(sample) - self._starts[shard]

    def _is_remote(self, shard: int) -> bool:
        return isinstance(self.paths[shard], str)

    def _where(self, shard: int, row: int) -> str:
        return f"{self._name(shard)}: sample {self.indexes[shard].key(row)}"

    def _name(self, shard: int) -> str:
        path = self.paths[shard]
        return shown(path)

    def _checked(
        self, shard: int, row: int, offset: int, size: int, expected: int
    ) -> bytes | memoryview:
        """Bytes of a shard that have the checksum `expected`."""
        # Holding the file keeps it open, even if the cache of open files drops it meanwhile.
        file: File = self._open(shard)
        data = file.read(offset, size)
        if checksum(data) == expected:
            return data
        if self._is_remote(shard):  # the disk of the cache may be what is damaged
            file.forget(offset, size)
            data = file.read(offset, size)
        if checksum(data) != expected:
            raise ValueError(
                f"{self._where(shard, row)}: the {size} bytes from {offset} must be those that "
                f"were indexed, got {len(data)} bytes of another checksum; the shard is damaged or "
                "was replaced: restore it"
            )
        return data


def spans(file: File, index: ShardIndex) -> Iterator[tuple[int, int, memoryview]]:
    """(row, offset, bytes) of each sample of a shard, in order and not checked; fewer bytes than
    there should be where the file ends early."""
    starts, row = index.sample_start.tolist(), 0
    while row < index.num_samples:
        first = row
        last = max(bisect_right(starts, starts[first] + STRETCH) - 1, first + 1)
        stretch = memoryview(file.read(starts[first], starts[last] - starts[first]))
        for row in range(first, last):
            start = starts[row] - starts[first]
            yield row, starts[row], stretch[start : start + starts[row + 1] - starts[row]]
        row = last
