"""The page of memory in which a rank says what it does, for the process that watches over it.

Imports no torch: that process begins in milliseconds and takes 10 MB.
"""

from __future__ import annotations

import mmap
import struct
from typing import NamedTuple

SIZE = 8192
# What a rank does; in the order of a step. The first and the last may take long.
KINDS = ("start", "data", "count", "forward", "backward", "device", "update", "metrics", "between")
DOES = {
    "start": "before its first step",
    "data": "waiting for data",
    "count": "in the sum of counts over ranks that a step begins with",
    "forward": "in the forward pass",
    "backward": "in the backward pass",
    "device": "waiting for the device, or in the sum of the loss over ranks",
    "update": "in the update",
    "metrics": "reading figures",
    "between": "between steps: checkpoint, evaluation",
}
WARM_UP = 3  # steps in which layers are compiled and communicators made

_FIELDS = struct.Struct("<QqqIidd")
_TEXT = struct.Struct("<I")


class Beat(NamedTuple):
    """What a rank last said."""

    beats: int  # how often it has said something
    step: int
    steps: int  # begun by this process
    kind: int
    module: int  # its number, or -1
    slowest: float  # seconds of the slowest step from WARM_UP on
    stop_at: float  # time.monotonic() when it was asked to stop, or 0
    keys: str  # of the samples in hand


def write(page: mmap.mmap, beat: Beat) -> None:
    """All but the keys: under a microsecond."""
    _FIELDS.pack_into(page, 0, *beat[:-1])


def write_keys(page: mmap.mmap, keys: str) -> None:
    """The samples in hand, cut to what there is room for."""
    text = keys.encode()[: SIZE - _FIELDS.size - _TEXT.size]
    _TEXT.pack_into(page, _FIELDS.size, len(text))
    begin = _FIELDS.size + _TEXT.size
    page[begin : begin + len(text)] = text


def read(page: mmap.mmap) -> Beat:
    """What the page says now."""
    (length,) = _TEXT.unpack_from(page, _FIELDS.size)
    begin = _FIELDS.size + _TEXT.size
    keys = page[begin : begin + length].decode(errors="replace")
    return Beat._make((*_FIELDS.unpack_from(page, 0), keys))
