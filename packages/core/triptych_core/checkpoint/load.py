"""Loading: the newest checkpoint that is whole, by any number of ranks under any ZeRO stage."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from triptych_core.checkpoint.fragments import load_stretches
from triptych_core.checkpoint.generators import load_generators, seed_generators
from triptych_core.checkpoint.identity import check_identity, identity
from triptych_core.checkpoint.manifest import find_damage, read_manifest
from triptych_core.checkpoint.payload import Payloads
from triptych_core.checkpoint.together import on_all
from triptych_core.config import StageConfig


def newest_whole(found: list[Path]) -> Path:
    """The newest checkpoint without damage, of those found, oldest first; newer ones are named.

    Every rank reads a part of the files.

    Raises:
        ValueError: a rank does not see the folder, or all are damaged.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    problems: list[str] = []
    for path in reversed(found):
        on_all(partial(_check_visible, path))
        damage = list(filter(None, on_all(partial(find_damage, path, rank, world_size))))
        if not damage:
            if problems:
                _say(f"{'; '.join(problems)}: goes on from {path}, the newest that is whole")
            return path
        problems.append(damage[0])
    raise ValueError(
        f"run.dir: must have a whole checkpoint to go on from, got {'; '.join(problems)}; restore "
        "the files or start in another run.dir"
    )


def load_checkpoint(engine: Any, config: StageConfig, path: Path) -> tuple[int, dict[str, Any]]:
    """Restore weights, optimizer and generators; returns the step taken last and the data state.

    Generators go on where they were on the same number of ranks; on another they are seeded anew,
    which is said.

    Raises:
        ValueError: the checkpoint is of another model, optimizer, precision or set of trainable
            parameters, or lies beyond `run.steps`.
    """
    state = json.loads((path / "state.json").read_text())
    check_identity(path / "state.json", state, identity(engine.module, config))
    step, saved_by = int(state["step"]), state["world_size"]
    if step > config.run.steps:
        raise ValueError(
            f"run.steps: must be at least the {step} steps already taken in {path}, got "
            f"{config.run.steps}; train longer or start in another run.dir"
        )
    names = [name for name in read_manifest(path) if name.startswith("rank-")]
    load_stretches(engine, Payloads(path / name for name in names))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if saved_by == world_size:
        load_generators(path / f"random-{rank:05d}.safetensors")
    else:
        seed_generators(config.run.seed, step, rank)
        _say(
            f"{path}: was saved by {saved_by} ranks, {world_size} go on; random generators are "
            "seeded from run.seed, step and rank"
        )
    return step, state["data"]


def _check_visible(path: Path) -> None:
    if not path.is_dir():
        raise ValueError(
            f"run.dir: must be one folder that all ranks see, got no {path}; put it on shared "
            "storage"
        )


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
