"""Blocks of remote files on the local disk: bounded, shared by processes, safe to kill.

A block is one file, written under another name and then renamed, so it is whole or absent; a
reader holds it open for the moment it reads, so removing it harms nobody. What is used is counted
in one small file under a lock that the kernel frees with its process. There is no shared memory,
no server, and nothing to clean up: the folder may be deleted at any time.
"""

import fcntl
import hashlib
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOCKS = 256
"""Lock files for all blocks together: few enough to keep, many enough that few waits collide."""
STALE = 3600.0
"""Seconds after which a temporary file is one of a killed process."""
FRESH = 60.0
"""Seconds within which a use is not noted again: a write of metadata per read would be dear."""
LOW_WATER = 0.9
"""Share of the bound that is left when room is made: so that not every block makes room."""


class BlockCache:
    """Numbered blocks by the identity of their file; the least recently used go first."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes

    def read(self, identity: str, block: int, start: int, end: int) -> bytes | None:
        """The bytes of a block from `start` to `end`, or None if they are not there."""
        try:
            descriptor = os.open(self._path(identity, block), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            stat = os.fstat(descriptor)
            if time.time() - stat.st_mtime > FRESH:
                with suppress(OSError):
                    os.utime(descriptor)
            data = os.pread(descriptor, end - start, start)
            return data if len(data) == end - start else None
        except OSError:  # a bad disk must not be worse than no cache
            return None
        finally:
            os.close(descriptor)

    def store(self, identity: str, block: int, data: bytes) -> None:
        """Keep a block, making room first; a disk that is full or read-only keeps nothing."""
        path = self._path(identity, block)
        if len(data) > self._max_bytes:
            return
        temporary = self._folder / "new" / f"{os.getpid()}-{threading.get_ident()}-{path.name}"
        try:
            temporary.parent.mkdir(parents=True, exist_ok=True)
            path.parent.mkdir(exist_ok=True)
            with self._counted(len(data)):
                temporary.write_bytes(data)
                temporary.replace(path)
        except OSError:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    def drop(self, identity: str, block: int) -> None:
        """Remove a block; its bytes stay counted until room is made."""
        with suppress(OSError):
            self._path(identity, block).unlink(missing_ok=True)

    @contextmanager
    def lock(self, identity: str, block: int) -> Iterator[None]:
        """Keep other processes and threads from fetching the same block meanwhile."""
        number = int(self._name(identity, block)[:8], 16) % LOCKS
        with self._locked(f"{number:02x}"):
            yield

    @contextmanager
    def _counted(self, size: int) -> Iterator[None]:
        """Room for `size` bytes, added to what is used; one process at a time."""
        with self._locked("used"):
            count = self._folder / "used"
            try:
                used = int(count.read_text())
            except (OSError, ValueError):  # the first process, or one was killed while writing
                used = self._make_room(self._max_bytes)
            if used + size > self._max_bytes:
                used = self._make_room(int(self._max_bytes * LOW_WATER) - size)
            count.write_text(str(used + size))
            yield

    def _make_room(self, limit: int) -> int:
        """Remove blocks, those not used for the longest first, until at most `limit` bytes are
        left, and what killed processes left behind; return the bytes that are left."""
        files, used, now = [], 0, time.time()
        for folder in os.scandir(self._folder):
            if folder.name == ".locks" or not folder.is_dir():
                continue
            for entry in os.scandir(folder):
                with suppress(OSError):
                    stat = entry.stat()
                    stale = folder.name == "new" and now - stat.st_mtime > STALE
                    files.append((0.0 if stale else stat.st_mtime, stat.st_size, entry.path))
                    used += stat.st_size
        for mtime, size, path in sorted(files):
            if used <= max(limit, 0) and mtime > 0:
                break
            with suppress(OSError):
                Path(path).unlink()
                used -= size
        return used

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        folder = self._folder / ".locks"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError:
            yield
            return
        try:
            with suppress(OSError):  # some network file systems cannot lock: work may be done twice
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _path(self, identity: str, block: int) -> Path:
        name = self._name(identity, block)
        return self._folder / name[:2] / name

    def _name(self, identity: str, block: int) -> str:
        return hashlib.sha256(f"{identity}\n{block}".encode()).hexdigest()[:40]
