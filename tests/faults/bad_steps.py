"""Losses that are no numbers, or spikes: one update is left out, and nothing else."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from tests.core.test_loss_guard import BAD, LAYOUTS, STEPS, endings, train_on
from tests.faults.outcome import Outcome
from tests.faults.toy import on_ranks


def bad_steps(folder: Path, short: bool) -> Outcome:
    """NaN, Inf and a spike on one rank of two, in every layout; half are cut right after one."""
    layouts = LAYOUTS[:1] if short else LAYOUTS
    found = folder / "found.json"
    codes = on_ranks(
        partial(_on_a_rank, folder, len(layouts), found),
        folder / "said.txt",
        timeout=3600,
    )
    outcome = Outcome()
    if codes != [0, 0]:
        return Outcome(broke=(folder / "said.txt").read_text()[-2000:])
    for number, unlike in enumerate(json.loads(found.read_text())):
        listed = folder / f"{number}-bad/skipped.jsonl"
        lines = listed.read_text().splitlines() if listed.exists() else []
        skipped = {line["step"]: line for line in map(json.loads, lines)}
        for step in BAD:
            keys = [
                key for pack in skipped.get(step, {"packs": []})["packs"] for key in pack["keys"]
            ]
            named = keys == [f"{step}-{r}-{m}" for r in (0, 1) for m in range(LAYOUTS[number][3])]
            what = f"{LAYOUTS[number]}, step {step}: {keys}, differs: {unlike}"
            outcome.add(what, detected=named, recovered=not unlike, wrong=bool(unlike))
    return outcome


def too_many_in_a_row(folder: Path, short: bool) -> Outcome:
    """The run ends after n of them, or at the first, as it was told."""
    codes = on_ranks(partial(_endings, folder), folder / "said.txt")
    outcome = Outcome()
    if codes != [0, 0]:
        return Outcome(broke=(folder / "said.txt").read_text()[-2000:])
    for rank in (0, 1):
        for what, as_told in json.loads((folder / f"rank-{rank}.json").read_text()).items():
            outcome.add(f"rank {rank}, {what}", detected=as_told, recovered=as_told)
    return outcome


def _on_a_rank(folder: Path, count: int, found: Path) -> None:
    import torch.distributed as dist

    good = [step for step in range(1, STEPS + 1) if step not in BAD]
    unlike = []
    for number, layout in enumerate(LAYOUTS[:count]):
        wanted = train_on(folder / f"{number}-good", layout, good)
        cut = 9 if number % 2 else 0
        ours = train_on(folder / f"{number}-bad", layout, range(1, STEPS + 1), cut=cut)
        mine = [key for key in wanted if not wanted[key].equal(ours[key])]
        both: list[list[str]] = [[], []]
        dist.all_gather_object(both, mine)
        unlike.append([*both[0], *both[1]])
    if dist.get_rank() == 0:
        found.write_text(json.dumps(unlike))


def _endings(folder: Path) -> None:
    import torch.distributed as dist

    try:
        row, stop, _ = endings(folder)
    except pytest.fail.Exception:  # it did not end
        row = stop = "went on"
    found = {"3 in a row": "up to step 6" in row, "the first": "in 1 step" in stop}
    (folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(found))
