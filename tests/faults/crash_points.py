"""Ranks killed at every single thing that a save does to the disk, and half-way through writes."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.faults.disk_calls import Call, watch_disk
from tests.faults.outcome import Outcome
from tests.faults.toy import differs, lost_and_repeated, on_ranks, train_toy

# Steps: of the checkpoint before; of the first that may be killed, written in the background; of
# the last of that run, written while all wait; of the end.
SAVED, KILLED, LAST = 2, 5, 6
WORDS = ("checkpoint.background=true", "checkpoint.keep=1")


def crash_points(folder: Path, short: bool) -> Outcome:
    """Each point of each rank: a real SIGKILL, then the run goes on and ends."""
    outcome, wanted, before = Outcome(), folder / "wanted", folder / "before"
    on_ranks(partial(train_toy, wanted, LAST, "checkpoint.keep=9"), folder / "wanted.txt")
    on_ranks(partial(train_toy, before, SAVED), folder / "before.txt")
    runs = []
    for rank in (0, 1):
        points = count_points(before, folder / f"count-{rank}", rank)
        for point in range(0, points, 16 if short else 1):
            run_dir = folder / f"rank-{rank}-point-{point}"
            shutil.copytree(before, run_dir)
            kill = _only(rank, partial(die_at, run_dir, point))
            on_ranks(partial(train_toy, run_dir, KILLED, *WORDS), run_dir / "said.txt", 2, kill)
            runs.append(run_dir)
    look_at_ends(outcome, runs, wanted)
    return outcome


def look_at_ends(outcome: Outcome, runs: list[Path], wanted: Path) -> None:
    """One job goes on with all that were killed, one after the other; then what became of each."""
    said, seconds = wanted.with_suffix(".on.txt"), 120 + 10 * len(runs)
    on_ranks(partial(_finish, runs), said, timeout=seconds)
    for run_dir in runs:
        wrong = differs(run_dir, wanted, LAST)
        lost, repeated = lost_and_repeated(run_dir)
        killed = run_dir / "killed"
        outcome.add(
            f"{run_dir.name}: {killed.read_text() if killed.exists() else 'never killed'}",
            detected=killed.exists(),
            recovered=not wrong,
            wrong=wrong,
            lost=lost,
            repeated=repeated,
        )


def count_points(before: Path, run_dir: Path, rank: int) -> int:
    """How many things a rank does to the disk in its saves."""
    shutil.copytree(before, run_dir)
    count = _only(rank, partial(die_at, run_dir, -1))
    codes = on_ranks(partial(_train_and_count, run_dir), run_dir / "said.txt", sabotage=count)
    assert not any(codes), codes
    return int((run_dir / "points").read_text())


def die_at(run_dir: Path, point: int) -> None:
    """This process is killed at the point-th thing it does below run_dir/checkpoints.

    A write is two points: before it, and when half of it is done. -1: they are counted only.
    """

    def told(call: Call) -> None:
        _TOLD.append(call)
        if len(_TOLD) == point + 1:
            die(run_dir, f"{call.kind} {Path(call.path).name}")

    watch_disk(run_dir / "checkpoints", told)


def die(run_dir: Path, where: str) -> None:
    """SIGKILL to this process, which leaves a mark: a rank that ended otherwise was not killed."""
    (run_dir / "killed").write_text(where)
    os.kill(os.getpid(), signal.SIGKILL)


_TOLD: list[Call] = []


def _only(rank: int, sabotage: Callable[[], None]) -> Callable[[int], None]:
    return lambda this: sabotage() if this == rank else None


def _train_and_count(run_dir: Path) -> None:
    train_toy(run_dir, KILLED, *WORDS)
    if _TOLD:
        (run_dir / "points").write_text(str(len(_TOLD)))


def _finish(runs: list[Path]) -> None:
    for run_dir in runs:
        train_toy(run_dir, LAST, *WORDS)
