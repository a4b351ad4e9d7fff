"""Signals that ask a run to stop: a flag, which ranks agree on at a step; nothing is done here.

A collective in a handler would deadlock: DeepSpeed's launcher ends ranks one by one, and a signal
finds each rank somewhere else.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

from triptych_core.faults.codes import PREEMPTED

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

# Launcher and group get one and the same signal, and the launcher sends its own to every rank:
# within so many seconds that is no second request. Nobody but a person sends SIGINT twice.
ECHO_SECONDS = 5.0


class StopRequest:
    """Whether this rank was asked to stop; a second request ends it at once.

    Args:
        say: whether this rank tells the user.
        told: called once, with the first request.
    """

    def __init__(self, *, say: bool, told: Callable[[], None] = lambda: None) -> None:
        self._say, self._told = say, told
        self._first: float | None = None
        self._interrupts = 0

    @property
    def is_set(self) -> bool:
        """Whether it was asked."""
        return self._first is not None

    def listen(self) -> None:
        """Take the signals of this process from now on; outside its main thread nothing is done."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._take)

    def ask(self) -> None:
        """Ask, as a signal would."""
        if self._first is None:
            self._first = time.monotonic()
            self._told()

    def _take(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if self._first is not None:
            is_echo = time.monotonic() - self._first < ECHO_SECONDS
            if self._interrupts > 1 or (number != signal.SIGINT and not is_echo):
                self._print("leaves at once; the last checkpoint is whole")
                os._exit(PREEMPTED)
            return
        self.ask()
        name = signal.Signals(number).name
        self._print(f"{name}: saves after this step and stops; once more to leave at once")

    def _print(self, text: str) -> None:
        if self._say:
            # Not print: the signal may have come in the middle of one.
            os.write(sys.stderr.fileno(), f"{text}\n".encode())
