"""One run a folder: a run that still saves is waited for, whoever starts the next one."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

POLL = 0.2  # seconds
# Of file systems that know no locks: a run there is as it was without one.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


_held: dict[Path, IO[str]] = {}  # a process loses its lock with the first file it closes


def hold(folder: Path, patience: float, say: Callable[[str], None]) -> None:
    """Keep other runs out of a folder until `release`, or until this process is gone.

    A launcher that was interrupted may be back while its ranks save: the next run would go on from
    the checkpoint before. patience: seconds to wait for them; say: is told that it waits. The lock
    is of the process alone, not of its children (POSIX), so that none outlives it.

    Raises:
        ValueError: another run holds the folder for longer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if folder.resolve() in _held:
        return
    file = (folder / ".lock").open("a+")
    until, waits = time.monotonic() + patience, False
    while not _lock(file):
        file.seek(0)
        holder = file.read().strip() or "a process"
        if time.monotonic() > until:
            file.close()
            raise ValueError(
                f"run.dir: must be of no other run, got {folder}, which {holder} has; wait for it, "
                "end it, or name another folder"
            )
        if not waits:
            say(f"waits for {holder}, whose run in {folder} is not over")
        waits = True
        time.sleep(POLL)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _held[folder.resolve()] = file


def release(folder: Path) -> None:
    """Let other runs have it; nothing where it is not held."""
    if file := _held.pop(folder.resolve(), None):
        file.close()


def _lock(file: IO[str]) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in _NO_LOCKS
    return True
