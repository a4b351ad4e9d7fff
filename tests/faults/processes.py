"""Processes that this one has started, and those that they have: found, and ended, by their ids."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

_SUBREAPER = 36  # of prctl


def adopt_orphans() -> None:
    """What this process's descendants leave behind becomes its children, and not init's."""
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)


def descendants(ancestor: int) -> list[int]:
    """Living processes that a process has started, itself or by others."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            if state not in "XZ":
                parents[int(path.parent.name)] = int(parent)
    found = {ancestor}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found - {ancestor})


def command_of(pid: int) -> str:
    """Its command line; of one that is gone none."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return ""


def has_loaded(pid: int, library: str) -> bool:
    """Whether a process has a shared library in its memory."""
    with suppress(OSError):
        return library in Path(f"/proc/{pid}/maps").read_text()
    return False


def end_descendants() -> list[int]:
    """Kill all that this process has started and that still runs, and collect it; returns which."""
    killed: list[int] = []
    while left := descendants(os.getpid()):
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        killed += left
        collect()
        time.sleep(0.02)
    return killed


def collect() -> None:
    """Take the exit codes of children that have ended and that nobody waits for."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
