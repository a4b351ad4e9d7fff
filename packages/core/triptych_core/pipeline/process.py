"""A step's processes: one group, whose output is shown and kept, and that never outlives us."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(Exception):
    """A signal that asks us to stop; its number is that of the exit code, 128 + it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C, a scheduler's SIGTERM and a closed terminal raise `Interrupted` in here."""

    def interrupt(number: int, frame: object) -> None:
        raise Interrupted(number)

    before = {number: signal.signal(number, interrupt) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_group(
    words: Sequence[str],
    *,
    cwd: Path,
    log: Path,
    environment: Mapping[str, str],
    inherited: Sequence[int] = (),
    grace_seconds: float = 30.0,
) -> int:
    """Run a command in a process group of its own; gives its exit code, -N after signal N.

    Output goes to our own and, appended, to `log`. However this ends, the whole group has ended:
    DeepSpeed's launcher, told alone, would leave its ranks running. It is sent SIGTERM, and
    SIGKILL once `grace_seconds` are over, in which stages save.

    Raises:
        Interrupted: as raised in here by a signal; after the group has ended.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        with _held() as signals:  # between a start and its handle nothing may be lost
            process = subprocess.Popen(
                words,
                cwd=cwd,
                env=dict(environment),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=inherited,
            )
            assert process.stdout is not None
            copier = threading.Thread(target=_copy, args=(process.stdout, file), daemon=True)
            copier.start()
        try:
            if signals:
                raise Interrupted(signals[0])
            return process.wait()
        finally:
            with _held():  # a second Ctrl-C must not leave ranks behind
                _end_group(process, grace_seconds)
                copier.join()


@contextmanager
def _held() -> Iterator[list[int]]:
    """Signals that ask us to stop are collected in here."""
    came: list[int] = []
    before = {number: signal.signal(number, lambda n, _: came.append(n)) for number in STOPPING}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_group(process: subprocess.Popen[bytes], grace_seconds: float) -> None:
    deadline = time.monotonic() + grace_seconds
    number: int = signal.SIGTERM
    while _signal_group(process.pid, number):
        while _signal_group(process.pid, 0) and time.monotonic() < deadline:
            process.poll()  # a dead leader that is not waited for still counts
            time.sleep(0.05)
        number = signal.SIGKILL


def _signal_group(group: int, number: int) -> bool:
    """Whether there was anyone to hear it."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def _copy(source: IO[bytes], file: IO[bytes]) -> None:
    while piece := os.read(source.fileno(), 1 << 16):
        file.write(piece)
        file.flush()
        sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()
