"""Which processes started a rank, noted before anything slow is imported. Imports no torch.

A launcher that dies while its ranks still import or load weights is found missing as soon as they
are watched; asked only then, a rank would take whoever adopted it for its launcher.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

Lineage = list[tuple[int, int]]  # processes, and the parents that they must keep

_NOTED: dict[int, Lineage] = {}  # by process: one that was forked has a parent of its own


def note_launcher() -> Lineage:
    """What must stay so: this rank's parent; of DeepSpeed's two launchers the outer one's, too.

    Nothing where no launcher has set a local rank: a shell may end, and what it started with nohup
    goes on.
    """
    if os.getpid() not in _NOTED:
        _NOTED[os.getpid()] = _find_launcher() if "LOCAL_RANK" in os.environ else []
    return _NOTED[os.getpid()]


def parent_of(pid: int) -> int:
    """The parent of a process; 0 if it is gone."""
    return status_of(pid)[1]


def status_of(pid: int) -> tuple[str, int]:
    """State and parent of a process, as /proc has them; gone: X."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return "X", 0
    state, parent = text.rpartition(")")[2].split()[:2]
    return state, int(parent)


def _find_launcher() -> Lineage:
    parent = os.getppid()
    found = [(os.getpid(), parent)]
    with suppress(OSError):  # it is gone by now, or lives outside of this container
        if b"deepspeed.launcher.launch" in Path(f"/proc/{parent}/cmdline").read_bytes():
            found.append((parent, parent_of(parent)))
    return found
