"""A disk that is full at any byte of a save: the run ends, what was saved stays, it goes on."""

from __future__ import annotations

import resource
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from tests.faults.outcome import Outcome
from tests.faults.toy import differs, lost_and_repeated, on_ranks, train_toy

SAVED, FULL, LAST = 2, 4, 6
SIZES = (0, 1, 100, 1000, 1500, 2000, 3000, 5000, 10_000)  # bytes a file may have


def full_disk(folder: Path, short: bool) -> Outcome:
    """One rank's files may not grow beyond a size; with room again the same command goes on."""
    outcome, wanted, before = Outcome(), folder / "wanted", folder / "before"
    on_ranks(partial(train_toy, wanted, LAST, "checkpoint.keep=9"), folder / "wanted.txt")
    on_ranks(partial(train_toy, before, SAVED), folder / "before.txt")
    trials = []
    for rank in (0, 1):
        for size in SIZES[2:3] if short else SIZES:
            run_dir = folder / f"{rank}-{size}"
            shutil.copytree(before, run_dir)
            words = ("checkpoint.keep=1", f"checkpoint.background={str(rank == 0).lower()}")
            work = partial(_with_little_room, run_dir, rank, size, words)
            said = folder / f"{rank}-{size}.txt"
            codes = on_ranks(work, said)
            named = f"{run_dir}/checkpoints/partial-" in said.read_text()
            named &= "must be written whole, got File too large" in said.read_text()
            trials.append((run_dir, 2 in codes and 0 not in codes and named))
    on_ranks(partial(_finish, [run_dir for run_dir, _ in trials]), folder / "on.txt", timeout=3600)
    for run_dir, said_so in trials:
        wrong = differs(run_dir, wanted, LAST)
        lost, repeated = lost_and_repeated(run_dir)
        outcome.add(
            f"{run_dir.name}: said {said_so}",
            detected=said_so,
            recovered=not wrong,
            wrong=wrong,
            lost=lost,
            repeated=repeated,
        )
    return outcome


def _with_little_room(run_dir: Path, rank: int, size: int, words: tuple[str, ...]) -> None:
    """From the first save on."""
    import torch.distributed as dist

    from triptych_core.checkpoint import save

    write = save.write_share

    def write_share(snapshot: Any) -> Any:
        if dist.get_rank() == rank:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        return write(snapshot)

    save.write_share = write_share
    train_toy(run_dir, FULL, *words)


def _finish(runs: list[Path]) -> None:
    for run_dir in runs:
        train_toy(run_dir, LAST)
