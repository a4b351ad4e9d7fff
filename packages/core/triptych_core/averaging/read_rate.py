"""How fast a disk reads, for a forecast."""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path

_CHUNK, _MOST = 1 << 23, 1 << 28


def read_rate(path: Path) -> float:
    """Bytes per second of reading the start of a file, past the page cache where that is possible.

    At most 256 MiB are read.
    """
    memory = mmap.mmap(-1, _CHUNK)  # direct reading wants pages
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:  # a file system in memory
        descriptor = os.open(path, os.O_RDONLY)
    try:
        began, done = time.monotonic(), 0
        while done < _MOST and (count := os.preadv(descriptor, [memory], done)):
            done += count
        return done / max(time.monotonic() - began, 1e-9)
    finally:
        os.close(descriptor)
