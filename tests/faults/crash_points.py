"""Ranks killed at every single thing that a save does to the disk, and half-way through writes."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.faults.outcome import Outcome
from tests.faults.toy import differs, lost_and_repeated, on_ranks, train_toy

SAVED, KILLED, LAST = 2, 4, 6  # steps: of the checkpoint before, of the killed one, of the end
WORDS = ("checkpoint.background=true", "checkpoint.keep=1")
_EVENTS = ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove")


def crash_points(folder: Path, short: bool) -> Outcome:
    """Each point of each rank: a real SIGKILL, then the run goes on and ends."""
    outcome = Outcome()
    wanted = folder / "wanted"
    on_ranks(partial(train_toy, wanted, LAST, "checkpoint.keep=9"), folder / "wanted.txt")
    before = folder / "before"
    on_ranks(partial(train_toy, before, SAVED), folder / "before.txt")
    trials = []
    for rank in (0, 1):
        points = count_points(before, folder / f"count-{rank}", rank)
        for point in range(0, points, 12 if short else 1):
            run_dir = folder / f"rank-{rank}-point-{point}"
            shutil.copytree(before, run_dir)
            work = partial(train_toy, run_dir, KILLED, *WORDS)
            kill = _only(rank, partial(die_at, run_dir, point))
            codes = on_ranks(work, run_dir / "said.txt", sabotage=kill)
            trials.append((run_dir, codes[rank] == -signal.SIGKILL))
    # One job goes on with all of them, one after the other.
    on_ranks(partial(_finish, [run_dir for run_dir, _ in trials]), folder / "on.txt", timeout=1200)
    for run_dir, died in trials:
        wrong = differs(run_dir, wanted, LAST)
        lost, repeated = lost_and_repeated(run_dir)
        outcome.add(
            f"{run_dir.name}: {'killed' if died else 'not killed'}",
            detected=died,
            recovered=not wrong,
            wrong=wrong,
            lost=lost,
            repeated=repeated,
        )
    return outcome


def count_points(before: Path, run_dir: Path, rank: int) -> int:
    """How many things a rank does to the disk in a save."""
    shutil.copytree(before, run_dir)
    count = _only(rank, partial(die_at, run_dir, -1))
    codes = on_ranks(partial(_train_and_count, run_dir), run_dir / "said.txt", sabotage=count)
    assert not any(codes), codes
    return int((run_dir / "points").read_text())


def die_at(run_dir: Path, point: int) -> None:
    """From now on this process is killed at the point-th thing it does below run_dir/checkpoints.

    A write is two points: before it, and when half of it is done. -1: they are counted only.
    """
    done = _Points(point)
    below = str(run_dir / "checkpoints")

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _EVENTS:
            return
        path = str(arguments[0])
        # What is removed is named by its folder's descriptor, and nothing else is removed here.
        if path.startswith(below) or (event in ("os.remove", "os.rmdir")):
            done.pass_one()

    sys.addaudithook(watch)
    _watch_syncs(done)
    _watch_writes(done, below)
    _POINTS.append(done)


class _Points:
    def __init__(self, point: int) -> None:
        self._point, self.count = point, 0

    def pass_one(self, finish: Callable[[], None] = lambda: None) -> None:
        if self.count == self._point:
            finish()
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1


_POINTS: list[_Points] = []


def _watch_syncs(done: _Points) -> None:
    sync = os.fsync

    def counted(descriptor: int) -> None:
        done.pass_one()
        sync(descriptor)

    os.fsync = counted


def _watch_writes(done: _Points, below: str) -> None:
    open_path = Path.open

    def opened(self: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        file = open_path(self, mode, *args, **options)
        return _File(file, done) if "w" in mode and str(self).startswith(below) else file

    Path.open = opened  # type: ignore[method-assign]


class _File:
    """A file whose writes are points."""

    def __init__(self, file: Any, done: _Points) -> None:
        self._file, self._done = file, done

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: Any) -> int:
        def half() -> None:
            self._file.write(bytes(data)[: len(data) // 2])
            self._file.flush()

        self._done.pass_one()
        self._done.pass_one(half)
        return int(self._file.write(data))


def _only(rank: int, sabotage: Callable[[], None]) -> Callable[[int], None]:
    return lambda this: sabotage() if this == rank else None


def _train_and_count(run_dir: Path) -> None:
    train_toy(run_dir, KILLED, *WORDS)
    if _POINTS:
        (run_dir / "points").write_text(str(_POINTS[0].count))


def _finish(runs: list[Path]) -> None:
    for run_dir in runs:
        train_toy(run_dir, LAST, *WORDS)
