"""Runs that go on with other ranks under another ZeRO stage: the same state, no sample lost."""

from __future__ import annotations

import json
import shutil
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults.outcome import Outcome
from tests.faults.toy import PACKS, lost_and_repeated, on_ranks, train_toy

SAVED, LAST = 2, 6
LAYOUTS = list(product((0, 1, 2, 3), (1, 2, 4)))  # stage, ranks
MOVES = [
    (LAYOUTS[number], LAYOUTS[(number + jump) % len(LAYOUTS)])
    for jump in (1, 5)
    for number in range(len(LAYOUTS))
]


def moves(folder: Path, short: bool) -> Outcome:
    """Saved in one layout, gone on with in another."""
    outcome, chosen = Outcome(), MOVES[::12] if short else MOVES
    for stage, ranks in {source for source, _ in chosen}:
        run_dir = folder / f"{stage}-{ranks}"
        _on(ranks, partial(_train, run_dir, LAST, stage), run_dir)
    for target_ranks in (1, 2, 4):
        mine = [move for move in chosen if move[1][1] == target_ranks]
        for (stage, ranks), (to_stage, _) in mine:
            run_dir = folder / f"{stage}-{ranks}-{to_stage}-{target_ranks}"
            shutil.copytree(folder / f"{stage}-{ranks}", run_dir)
            for step in (4, LAST):
                shutil.rmtree(run_dir / f"checkpoints/step-{step:06d}")
        runs = [(folder / f"{s[0]}-{s[1]}-{t[0]}-{t[1]}", t[0]) for s, t in mine]
        if runs:
            _on(target_ranks, partial(_go_on, runs), folder / f"to-{target_ranks}")
        for (stage, ranks), (to_stage, _) in mine:
            run_dir = folder / f"{stage}-{ranks}-{to_stage}-{target_ranks}"
            _look(outcome, folder / f"{stage}-{ranks}", run_dir)
    return outcome


def _on(ranks: int, work: Any, near: Path) -> None:
    said = near.with_suffix(".txt")
    codes = on_ranks(work, said, ranks, timeout=3600)
    assert not any(codes), said.read_text()[-3000:]


def _train(run_dir: Path, steps: int, stage: int) -> None:
    words = (
        f"engine.zero.stage={stage}",
        "checkpoint.keep=9",
        "engine.zero.persistence_threshold=4",
    )
    train_toy(run_dir, steps, *words, noise=0.0)


def _go_on(runs: list[tuple[Path, int]]) -> None:
    """Load and save again at once, then train to the end."""
    import torch.distributed as dist

    for run_dir, stage in runs:
        copy = run_dir.with_name(run_dir.name + "-again")
        if dist.get_rank() == 0:
            shutil.copytree(run_dir, copy)
        dist.barrier()
        _save_again(copy, stage)
        _train(run_dir, LAST, stage)


def _save_again(run_dir: Path, stage: int) -> None:
    import torch.distributed as dist

    from tests.faults.toy import Packs, build_toy
    from triptych_core.checkpoint.save import take_snapshot, write_snapshot
    from triptych_core.checkpoint.saver import resume
    from triptych_core.config import StageConfig, load_config

    words = [f"run.dir={run_dir}", f"run.steps={LAST}", "run.device=cpu", "optim.ema_decay=0.5"]
    words += [f"engine.zero.stage={stage}", "engine.precision=fp32", "checkpoint.keep=9"]
    words += ["schedule.kind=constant", "engine.zero.persistence_threshold=4", "optim.lr=1e-2"]
    words += [f"engine.gradient_accumulation_steps={PACKS // dist.get_world_size()}"]
    config = load_config(StageConfig, None, words)
    engine, stream = build_toy(config, 0.0), Packs(dist.get_rank(), dist.get_world_size())
    assert resume(engine, config, stream).step == SAVED
    write_snapshot(take_snapshot(engine, config, SAVED + 1, stream.state_dict()))
    engine.destroy()
    dist.barrier()


def _look(outcome: Outcome, source: Path, run_dir: Path) -> None:
    again = run_dir.with_name(run_dir.name + "-again")
    before, after = (
        whole_state(folder / f"checkpoints/step-{step:06d}")
        for folder, step in ((source, SAVED), (again, SAVED + 1))
    )
    same = before.keys() == after.keys() and all(before[k].equal(after[k]) for k in before)
    losses = [
        [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").open()]
        for folder in (source, run_dir)
    ]
    close = losses[1] == pytest.approx(losses[0], rel=1e-5) and len(losses[0]) == LAST
    lost, repeated = lost_and_repeated(run_dir)
    what = f"{run_dir.name}: state equal {same}, losses {losses}"
    outcome.add(what, recovered=same and close, wrong=not same, lost=lost, repeated=repeated)


def whole_state(checkpoint: Path) -> dict[tuple[str, str], torch.Tensor]:
    """All tensors of a checkpoint, put together from whoever wrote them."""
    from safetensors import safe_open

    parts: dict[tuple[str, str], dict[int, torch.Tensor]] = {}
    for path in checkpoint.glob("rank-*.safetensors"):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118, no mapping
                name, kind, begin = key.rsplit("|", 2)
                parts.setdefault((name, kind), {})[int(begin)] = file.get_tensor(key)
    return {key: torch.cat([some[at] for at in sorted(some)]) for key, some in parts.items()}
