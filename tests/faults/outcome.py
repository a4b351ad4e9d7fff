"""What came of the trials of one class of faults, and the row of the table that it makes."""

from __future__ import annotations

import os
import pickle
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

from tests.faults.processes import (
    adopt_orphans,
    collect,
    command_of,
    descendants,
    end_descendants,
)

LEAVES = 20.0  # seconds in which the last processes of a row end by themselves


@dataclass
class Outcome:
    """Counts over trials.

    detected: noticed and named as what it is. recovered: what went on from there ended as if
    nothing had happened, bit by bit; or nothing had to go on. wrong: weights that are not those of
    an undisturbed run were saved, or loaded. seconds: from each fault to the line that names it.
    bounds: seconds within which that must be, of each. problems: of trials; late: what was named
    too late; broke: why there are no trials, or not all of them.
    """

    trials: int = 0
    detected: int = 0
    recovered: int = 0
    wrong: int = 0
    lost: int = 0  # samples
    repeated: int = 0
    seconds: list[float] = field(default_factory=list)
    bounds: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    late: list[str] = field(default_factory=list)
    broke: str = ""
    took: float = 0.0  # seconds of all trials
    cpu: float = 0.0  # and of processors

    def add(
        self,
        what: str,
        *,
        detected: bool = True,
        recovered: bool = True,
        wrong: bool = False,
        lost: int = 0,
        repeated: int = 0,
    ) -> None:
        """One trial more."""
        self.trials += 1
        self.detected += detected
        self.recovered += recovered
        self.wrong += wrong
        self.lost += lost
        self.repeated += repeated
        if not (detected and recovered) or wrong or lost or repeated:
            self.problems.append(what)

    def named_after(self, seconds: float, bound: float) -> None:
        """So long after a fault it was named."""
        self.seconds.append(seconds)
        self.bounds.append(bound)
        if seconds > bound:
            self.late.append(f"named after {seconds:.1f} s, where {bound:.1f} s are allowed")

    @property
    def is_green(self) -> bool:
        """Whether every trial ended as it must."""
        return self.trials > 0 and not (self.problems or self.late or self.broke)

    @property
    def is_red(self) -> bool:
        """Whether a trial ended as none may; neither red nor green: it broke down, or was late."""
        return self.trials > 0 and bool(self.problems) and not self.broke

    @property
    def what_is_wrong(self) -> list[str]:
        """All of it in words."""
        return [*([self.broke] if self.broke else []), *self.problems, *self.late]


class Row(NamedTuple):
    """A class of faults: its trials are made in a folder of their own, that is empty.

    With `short` a few of them are made, that `make test` has time for.
    """

    key: str
    title: str
    run: Callable[[Path, bool], Outcome]


class Apart:
    """Work in a forked process of its own, which may be patched and leaves nothing behind."""

    def __init__(self, work: Callable[[], Outcome]) -> None:
        self.reader, writer = (Connection(end) for end in os.pipe())
        self._child = os.fork()
        if self._child == 0:
            adopt_orphans()
            writer.send_bytes(pickle.dumps(_do(work)))
            os._exit(0)
        writer.close()

    def result(self) -> Outcome:
        """Wait for it."""
        try:
            found: Outcome = pickle.loads(self.reader.recv_bytes())
        except EOFError:
            found = Outcome(broke="it died without a word")
        os.waitpid(self._child, 0)
        return found


def _do(work: Callable[[], Outcome]) -> Outcome:
    """Work, with what it took; nothing that it started may be left."""
    began = time.monotonic()
    try:
        found = work()
    except BaseException:
        found = Outcome(broke=traceback.format_exc())
    found.took = time.monotonic() - began
    deadline = time.monotonic() + LEAVES
    while descendants(os.getpid()) and time.monotonic() < deadline:
        collect()
        time.sleep(0.1)
    if left := [command_of(pid)[:200] for pid in end_descendants()]:
        found.problems.append(f"left behind: {left}")
    found.cpu = sum(os.times()[:4])
    return found


def in_parallel(
    works: Mapping[str, Callable[[], Outcome]], jobs: int
) -> Iterator[tuple[str, Outcome]]:
    """Each apart, so many at a time; yields what came of them as they end."""
    waiting, running = list(works.items()), dict[Any, tuple[str, Apart]]()
    while waiting or running:
        while waiting and len(running) < jobs:
            name, work = waiting.pop(0)
            begun = Apart(work)
            running[begun.reader] = name, begun
        for reader in wait(list(running)):
            name, begun = running.pop(reader)
            yield name, begun.result()
