"""Where shards lie: local files, and URLs, which are read in blocks through a cache."""

import functools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

from triptych_data.storage.cache import BlockCache
from triptych_data.storage.local import open_local
from triptych_data.storage.remote import (
    IgnoresRange,
    Patience,
    fetch,
    fetch_blocks,
    open_remote,
    retried_stat,
)

Location = Path | str
"""A local path, or a URL as a str."""
T = TypeVar("T")
R = TypeVar("R")
PARALLEL = 16
"""Requests at once from one process: hides 50 ms of latency at 300 requests a second."""


@dataclass(frozen=True, slots=True)
class Storage:
    """How remote files are read: where their blocks are kept, how long to wait, how often to retry.

    The cache holds at most `cache_bytes`, in `cache_dir` or else `$XDG_CACHE_HOME/triptych/blocks`;
    any number of processes share it. Without a cache (0) each sample is one ranged request.
    """

    cache_dir: str | None = None
    cache_bytes: int = 20_000_000_000
    block_bytes: int = 1 << 20
    """what is fetched at once: 1 MiB takes about as long as its request's latency (10 Gb/s, 1 ms;
    100 Mb/s, 80 ms), and a random 42 kB sample pulls in no more than it must"""
    patience: Patience = field(default_factory=Patience)

    def read_whole(self, location: Location, *, fresh: bool = False) -> bytes:
        """All bytes of a small file, if `fresh` without what the cache may hold of it.

        Raises FileNotFoundError, and as `RemoteFile.read`.
        """
        if isinstance(location, Path):
            return location.read_bytes()
        remote = open_remote(location)
        stat = retried_stat(remote, self.patience)
        if stat.size is None or not stat.version or not self.cache_bytes:
            return fetch(remote, 0, None, self.patience)
        file = RemoteFile(location, f"{location}\n{stat.version}", stat.size, self)
        if fresh:
            file.forget(0, stat.size)
        return file.read(0, stat.size)

    def open(self, location: Location, size: int, identity: str) -> "File":
        """A file to read ranges of; `identity` says which content, for the cache."""
        if isinstance(location, Path):
            return open_local(location)
        return RemoteFile(location, f"{location}\n{identity}", size, self)

    def cache(self) -> BlockCache | None:
        if not self.cache_bytes:
            return None
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(self.cache_dir or Path(home) / "triptych" / "blocks")
        return _cache(folder, self.cache_bytes)


class File(Protocol):
    def read(self, offset: int, size: int) -> bytes | memoryview: ...

    def forget(self, offset: int, size: int) -> None: ...


class RemoteFile:
    """A URL read in blocks, which the cache keeps; `size` is what the file must have."""

    def __init__(self, url: str, identity: str, size: int, storage: Storage) -> None:
        self._remote = open_remote(url)
        self._identity = identity
        self._size = size
        self._storage = storage
        self._cache = storage.cache()

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`.

        Raises ValueError when they are not there or the server refuses, ConnectionError when it
        does not answer in time, after retries.
        """
        end = min(offset + size, self._size)
        if offset >= end:
            return b""
        if self._cache is None:
            return self._fetch_exactly(offset, end)
        step = self._storage.block_bytes
        blocks = range(offset // step, (end - 1) // step + 1)
        spans = {i: (max(offset - i * step, 0), min(end - i * step, step)) for i in blocks}
        parts = {i: self._cache.read(self._identity, i, *span) for i, span in spans.items()}
        for run in _runs([i for i, part in parts.items() if part is None]):
            fetched = self._fetch(run)
            parts |= {i: fetched.get(i, b"")[slice(*spans[i])] for i in run}
        return b"".join(part or b"" for part in parts.values())

    def forget(self, offset: int, size: int) -> None:
        """Drop the blocks of a range from the cache: what it holds has been found to be wrong."""
        step = self._storage.block_bytes
        if self._cache is not None:
            for block in range(offset // step, -(-(offset + size) // step)):
                self._cache.drop(self._identity, block)

    def _fetch_exactly(self, start: int, end: int) -> bytes:
        try:
            return fetch(self._remote, start, end, self._storage.patience)
        except IgnoresRange:
            raise ValueError(
                f"{self._remote.shown}: the server must answer requests for a range of bytes, got "
                "the whole file; use a cache that holds it, another server, or a local copy"
            ) from None

    def _fetch(self, run: range) -> dict[int, bytes]:
        """Blocks that follow one another, from the server, unless another process was faster."""
        cache, step = self._cache, self._storage.block_bytes
        assert cache is not None
        ends = {i: min((i + 1) * step, self._size) - i * step for i in run}
        with cache.lock(self._identity, run.start):
            present = {i: cache.read(self._identity, i, 0, size) for i, size in ends.items()}
            if all(part is not None for part in present.values()):
                return {i: part for i, part in present.items() if part is not None}
            start = run.start * step
            try:
                end = min(run.stop * step, self._size)
                data = fetch(self._remote, start, end, self._storage.patience)
            except IgnoresRange:
                return self._fetch_all(run)
            parts = {i: data[i * step - start : (i + 1) * step - start] for i in run}
            for block, part in parts.items():
                cache.store(self._identity, block, part)
        return parts

    def _fetch_all(self, run: range) -> dict[int, bytes]:
        """From a server that sends whole files only: all of it, once, into the cache."""
        cache, storage, parts = self._cache, self._storage, dict[int, bytes]()
        if cache is None or self._size > storage.cache_bytes // 2:
            return {run.start: self._fetch_exactly(0, self._size)}  # raises
        pieces = fetch_blocks(self._remote, storage.block_bytes, storage.patience)
        for block, part in enumerate(pieces):
            cache.store(self._identity, block, part)
            if block in run:
                parts[block] = part
        return parts


def in_parallel(function: Callable[[T], R], items: Iterable[T], remote: bool) -> list[R]:
    """`function` of each item, in order; of remote ones in threads, which mostly wait."""
    if not remote:
        return list(map(function, items))
    with ThreadPoolExecutor(PARALLEL) as pool:
        return list(pool.map(function, items))


@functools.lru_cache(maxsize=8)
def _cache(folder: Path, max_bytes: int) -> BlockCache:
    return BlockCache(folder, max_bytes)


def _runs(blocks: list[int]) -> list[range]:
    """Ascending block numbers as ranges without gaps."""
    runs: list[range] = []
    for block in blocks:
        if runs and runs[-1].stop == block:
            runs[-1] = range(runs[-1].start, block + 1)
        else:
            runs.append(range(block, block + 1))
    return runs
