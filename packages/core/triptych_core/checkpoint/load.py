"""Loading: the newest checkpoint that is whole, by any number of ranks under any ZeRO stage."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from triptych_core.checkpoint.fragments import load_stretches
from triptych_core.checkpoint.generators import load_generators, seed_generators
from triptych_core.checkpoint.identity import changes, check_identity, identity
from triptych_core.checkpoint.manifest import find_damage, read_manifest
from triptych_core.checkpoint.payload import Payloads
from triptych_core.checkpoint.together import on_all
from triptych_core.code import code_fingerprint
from triptych_core.config import StageConfig
from triptych_core.optim.adamw import STATE_DTYPES
from triptych_core.optim.ema import AVERAGE
from triptych_core.secrets import masked_tree

# Settings that change what the same steps compute, beside those that are refused.
_SAID = ("engine.precision", "engine.reduce_dtype", "optim.state_dtype", "optim.ema_decay")


class Loaded(NamedTuple):
    """The step taken last, states of data and loss guard, and for run.json what has changed."""

    step: int
    data: dict[str, Any]
    loss_guard: dict[str, Any] | None
    record: dict[str, Any]


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


def load_checkpoint(engine: Any, config: StageConfig, path: Path) -> Loaded:
    """Restore weights, optimizer and generators.

    Generators go on where they were on the same number of ranks; on another they are seeded anew.
    States come in this run's dtype, and averages of weights go where it keeps none. That, and code
    that has changed, is said.

    Raises:
        ValueError: the checkpoint is of another model (unless `checkpoint.resume_anyway`),
            optimizer or set of trainable parameters, or lies beyond `run.steps`.
    """
    state = _read_state(path / "state.json")
    wanted, anyway = identity(engine.module, config), config.checkpoint.resume_anyway
    passed = check_identity(path / "state.json", state, wanted, anyway=anyway)
    step = int(state["step"])
    if step > config.run.steps:
        raise ValueError(
            f"run.steps: must be at least the {step} steps already taken in {path}, got "
            f"{config.run.steps}; train longer or start in another run.dir"
        )
    names = [name for name in read_manifest(path) if name.startswith("rank-")]
    moments = STATE_DTYPES[config.optim.state_dtype]
    dtypes: dict[str, torch.dtype | None] = {"exp_avg": moments, "exp_avg_sq": moments}
    if config.optim.ema_decay is None:
        dtypes[AVERAGE] = None
    load_stretches(engine, Payloads(path / name for name in names), dtypes)
    _restore_generators(config, path, step, state["world_size"])
    record = _compare(config, path, state, passed)
    return Loaded(step, state["data"], state.get("loss_guard"), record)


def _restore_generators(config: StageConfig, path: Path, step: int, saved_by: int) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if saved_by == world_size:
        load_generators(path / f"random-{rank:05d}.safetensors")
    else:
        seed_generators(config.run.seed, step, rank)
        _say(
            f"{path}: was saved by {saved_by} ranks, {world_size} go on; random generators are "
            "seeded from run.seed, step and rank"
        )


def _compare(
    config: StageConfig, path: Path, state: dict[str, Any], passed: list[str]
) -> dict[str, Any]:
    """What of ranks, settings and code is another than when it was saved; said where it counts."""
    now = masked_tree(config.model_dump(mode="json"))
    changed = changes(masked_tree(state.get("config", now)), now)  # old ones have secrets
    code = code_fingerprint()
    said = [key for key in _SAID if key in changed]
    if state.get("code", code) != code:
        said.append("the code of Triptych")
    said += [f"{field} (checkpoint.resume_anyway)" for field in passed]
    if said:
        _say(f"{path}: goes on although changed since: {', '.join(said)}")
    return {
        "step": state["step"],
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "world_size": [state["world_size"], dist.get_world_size()],
        "code": [state.get("code"), code],
        "changed": changed,
        "resumed_anyway": passed,
    }


def _read_state(file: Path) -> dict[str, Any]:
    """The facts of a checkpoint whose files are those of its manifest, whoever wrote that."""
    try:
        state = json.loads(file.read_text())
        step, ranks = state["step"], state["world_size"]
        if not (
            isinstance(step, int) and isinstance(ranks, int) and isinstance(state["data"], dict)
        ):
            raise TypeError(f"step {step!r} of {ranks!r} ranks")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"{file}: must be the state of a checkpoint, got {error!r}; take another checkpoint"
        ) from error
    return dict(state)


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
