"""Checkpoints: complete or absent, resumed on the same world size and ZeRO stage.

checkpoints/step-000100/
    state.json             step, data position, world size, versions: what must match
    random-00000.safetensors   generators of each rank
    engine/                DeepSpeed's own files: weights, masters, optimizer
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any, Protocol

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from safetensors.torch import load_file, save_file

from triptych_core.config import StageConfig, is_due
from triptych_core.metrics import Metrics

_TAG = "engine"
_NAME = re.compile(r"step-\d{6,}")


class Resumable(Protocol):
    """The data iterator's half of the contract."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first; half-written ones have another name."""
    found = (run_dir / "checkpoints").glob("step-*")
    return sorted((path for path in found if _NAME.fullmatch(path.name)), key=_step_of)


def save_if_due(
    engine: Any, config: StageConfig, batches: Resumable, metrics: Metrics, step: int
) -> None:
    """Save every `checkpoint.every` steps and after the last, unless `checkpoint.save` is off."""
    if config.checkpoint.save and is_due(step, config.checkpoint.every, config.run.steps):
        path = save_checkpoint(engine, config, step, batches.state_dict())
        metrics.note(f"step {step}  saved {path}")
        metrics.restart_clock()


def save_checkpoint(
    engine: Any, config: StageConfig, step: int, data_state: dict[str, Any]
) -> Path:
    """Save everything a bit-equal resume needs; every rank takes part.

    Written under a temporary name, synced and renamed, then older ones beyond
    `checkpoint.keep` are removed.
    """
    root = config.run.dir / "checkpoints"
    final, partial = root / f"step-{step:06d}", root / f"partial-step-{step:06d}"
    is_main = dist.get_rank() == 0
    if is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    engine.save_checkpoint(str(partial), tag=_TAG, save_latest=False)
    _save_generators(partial / f"random-{dist.get_rank():05d}.safetensors")
    dist.barrier()
    if is_main:
        state = {
            "step": step,
            "data": data_state,
            "versions": {"torch": torch.__version__, "deepspeed": deepspeed.__version__},
            **_must_match(engine, config),
        }
        (partial / "state.json").write_text(json.dumps(state, indent=2) + "\n")
        _sync_tree(partial)
        _remove(final)
        partial.rename(final)
        _sync_directory(root)
        for old in checkpoints(config.run.dir)[: -config.checkpoint.keep]:
            _remove(old)
    dist.barrier()
    return final


def resume(engine: Any, config: StageConfig, batches: Resumable) -> int:
    """Go on from the run's newest checkpoint, if there is one.

    Learning rate, weight decay and Adam's constants are those of this run's configuration.
    Returns the last step already taken; 0 for a fresh start.

    Raises:
        ValueError: the folder has checkpoints and `checkpoint.resume` is never, or the newest one
            does not fit this run.
    """
    found = checkpoints(config.run.dir)
    # One rank looks and all follow: another node's view of the folder may be stale.
    name = [found[-1].name if found else None]
    dist.broadcast_object_list(name, src=0)
    if name[0] is None:
        return 0
    path = config.run.dir / "checkpoints" / name[0]
    if config.checkpoint.resume == "never":
        raise ValueError(
            f"checkpoint.resume: must be auto where a run has checkpoints, got never with {path}; "
            "choose another run.dir or remove the folder"
        )
    if not path.is_dir():
        raise ValueError(
            f"run.dir: must be one folder that all ranks see, got no {path} on rank "
            f"{dist.get_rank()}; put it on shared storage"
        )
    settings = [dict(group, params=None) for group in engine.optimizer.param_groups]
    step, data_state = load_checkpoint(engine, config, path)
    for group, setting in zip(engine.optimizer.param_groups, settings, strict=True):
        group.update({key: value for key, value in setting.items() if key != "params"})
    batches.load_state_dict(data_state)
    return step


def load_checkpoint(engine: Any, config: StageConfig, path: Path) -> tuple[int, dict[str, Any]]:
    """Restore weights, optimizer and generators; returns the step taken last and the data state.

    Raises:
        ValueError: the checkpoint was made with another world size, ZeRO stage, precision,
            optimizer or set of trainable parameters, or lies beyond `run.steps`.
    """
    state = {"optimizer": "adamw"} | json.loads((path / "state.json").read_text())
    for key, wanted in _must_match(engine, config).items():
        if state[key] != wanted:
            raise ValueError(
                f"{path}/state.json: {key} must be {wanted} as in this run, got {state[key]}; "
                "resume with the same setting or start in another run.dir"
            )
    if state["step"] > config.run.steps:
        raise ValueError(
            f"run.steps: must be at least the {state['step']} steps already taken in {path}, got "
            f"{config.run.steps}; train longer or start in another run.dir"
        )
    loaded, _ = engine.load_checkpoint(str(path), tag=_TAG)
    assert loaded is not None, f"DeepSpeed found no checkpoint in {path}"
    _load_generators(path / f"random-{dist.get_rank():05d}.safetensors")
    return int(state["step"]), state["data"]


def _must_match(engine: Any, config: StageConfig) -> dict[str, Any]:
    trainable = [p for p in engine.module.parameters() if p.requires_grad]
    return {
        "world_size": dist.get_world_size(),
        "zero_stage": config.engine.zero.stage,
        "precision": config.engine.precision,
        "optimizer": config.optim.name,
        "trainable_parameters": sum(getattr(p, "ds_numel", p.numel()) for p in trainable),
    }


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint so that no half of it ever carries a complete one's name."""
    if checkpoint.exists():
        doomed = checkpoint.with_name(f"partial-{checkpoint.name}-old")
        shutil.rmtree(doomed, ignore_errors=True)
        checkpoint.rename(doomed)
        shutil.rmtree(doomed)


def _save_generators(path: Path) -> None:
    tensors = {"torch": torch.get_rng_state()}
    if get_accelerator().device_name() != "cpu":
        tensors["device"] = get_accelerator().get_rng_state()
    algorithm, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, words, gauss = random.getstate()
    tensors["numpy"] = torch.from_numpy(np.asarray(keys, dtype=np.int64))
    tensors["python"] = torch.tensor(words, dtype=torch.int64)
    scalars = {
        "numpy": [algorithm, int(position), int(has_gauss), float(cached)],
        "python": [version, gauss],
    }
    save_file(tensors, path, metadata={"scalars": json.dumps(scalars)})


def _load_generators(path: Path) -> None:
    from safetensors import safe_open

    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        scalars = json.loads(file.metadata()["scalars"])
    torch.set_rng_state(tensors["torch"])
    if "device" in tensors:
        get_accelerator().set_rng_state(tensors["device"])
    algorithm, position, has_gauss, cached = scalars["numpy"]
    keys = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state((algorithm, keys, position, has_gauss, cached))
    version, gauss = scalars["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))


def _sync_tree(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_dir():
            _sync_directory(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _sync_directory(directory)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
