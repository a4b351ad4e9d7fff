"""A rank killed outside of any save, in every part of a step: the job ends, and goes on right."""

from __future__ import annotations

import shutil
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from tests.faults.crash_points import LAST, die, look_at_ends
from tests.faults.outcome import Outcome
from tests.faults.toy import on_ranks, train_toy

# As the loop says them of itself, and the steps: without a checkpoint, after one was written by
# this process, after one and a resume.
PARTS = ("data", "count", "forward", "backward", "device", "update", "metrics", "between")
STEPS = (1, 3, 5)
LEAVES = 10.0  # seconds within which the other rank must have left; the backend waits minutes


def lost_ranks(folder: Path, short: bool) -> Outcome:
    """Each rank in each part of some steps."""
    outcome, wanted, runs = Outcome(), folder / "wanted", []
    on_ranks(partial(train_toy, wanted, LAST, "checkpoint.keep=9"), folder / "wanted.txt")
    before = folder / "before"
    on_ranks(partial(train_toy, before, 4), folder / "before.txt")
    trials = list(product((0, 1), STEPS, PARTS))[:: 11 if short else 1]
    for rank, step, part in trials:
        run_dir = folder / f"rank-{rank}-step-{step}-{part}"
        if step == 5:
            shutil.copytree(before, run_dir)
        work = partial(train_toy, run_dir, LAST)
        kill = partial(_die_in, run_dir, rank, step, part)
        codes, seconds = on_ranks_timed(work, run_dir.with_suffix(".txt"), kill)
        if codes[1 - rank] <= 0:
            outcome.problems.append(f"{run_dir.name}: the other rank did not leave: {codes}")
        outcome.named_after(seconds, LEAVES)
        runs.append(run_dir)
    look_at_ends(outcome, runs, wanted)
    return outcome


def on_ranks_timed(work: Any, said: Path, sabotage: Any) -> tuple[list[int], float]:
    """Codes, and seconds from the first rank's end to the last one's."""
    ends: list[float] = []
    codes = on_ranks(work, said, sabotage=sabotage, patience=2 * LEAVES, ends=ends)
    return codes, ends[-1] - ends[0]


def _die_in(run_dir: Path, victim: int, step: int, part: str, rank: int) -> None:
    from triptych_core.faults.heartbeat import Heartbeat

    mark = Heartbeat.mark

    def mark_or_die(self: Any, kind: str, batches: Any = ()) -> None:
        mark(self, kind, batches)
        if self._step == step and kind == part:
            die(run_dir, f"{part} of step {step}")

    if rank == victim:
        Heartbeat.mark = mark_or_die  # type: ignore[method-assign]
