"""What a rank says while it steps, and how long it may say nothing."""

from __future__ import annotations

import mmap
import os
import socket
import time

from triptych_core.faults import page
from triptych_core.faults.heartbeat import Heartbeat
from triptych_core.faults.sentinel import FACTOR, SLOW, TELLING, _Watch


def test_the_first_step_that_is_watched_has_a_step_to_be_measured_by() -> None:
    """Or steps of 20 s, without a sign within, would be ended as standstills in the fourth."""
    memory = os.memfd_create("beats")
    os.ftruncate(memory, page.SIZE)
    beats = Heartbeat(memory)
    ours, theirs = socket.socketpair()
    settings = {"page": memory, "socket": theirs.detach(), "hang_seconds": "auto"}
    watch, seen = _Watch(settings), mmap.mmap(memory, page.SIZE)
    long = 20.0
    for step in range(1, page.WARM_UP + 2):
        beats.begin(step)
        beats.mark("backward")
        limit = watch._limit(page.read(seen))
        if step <= page.WARM_UP:
            assert limit == SLOW
        beats._began = time.monotonic() - long  # so long ago
        beats.end()
    assert limit > long and abs(limit - (FACTOR * long - TELLING)) < 1
    ours.close()
