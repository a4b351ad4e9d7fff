"""What of a run its checkpoints hold it to: the model, what trains, optimizer and precision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import nn

from triptych_core.checkpoint.fragments import kept_buffers
from triptych_core.config import StageConfig
from triptych_core.parallel.expert import whole_shape

FORMAT = 1  # of the files of a checkpoint


@runtime_checkable
class Fingerprinted(Protocol):
    """A model that says what else than its parameters makes it what it is."""

    def fingerprint(self) -> dict[str, Any]: ...


def identity(module: nn.Module, config: StageConfig) -> dict[str, Any]:
    """The part of a checkpoint's state that must be the same in a run that goes on from it."""
    trained: dict[str, str] = {}
    frozen: dict[str, str] = {}
    for name, parameter in module.named_parameters():
        # Under ZeRO-3 a parameter is an empty shard outside its module: ask for the whole shape.
        shape = str(whole_shape(parameter))
        (trained if parameter.requires_grad else frozen)[name] = shape
    return {
        "format": FORMAT,
        "parallel.tensor": config.parallel.tensor,  # parts of weights are stored as they are cut
        "precision": config.engine.precision,
        "optimizer": config.optim.name,
        "state_dtype": config.optim.state_dtype,
        "trainable_parameters": trained,
        "frozen_parameters": frozen,
        "buffers": {name: str(tuple(buffer.shape)) for name, buffer in kept_buffers(module)},
        "model": module.fingerprint() if isinstance(module, Fingerprinted) else {},
    }


def check_identity(path: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Compare what was saved in `path` with this run's.

    Raises:
        ValueError: with the first field that differs.
    """
    wanted = json.loads(json.dumps(wanted))  # tuples are lists there, too
    saved = {"parallel.tensor": 1} | saved
    for key, value in wanted.items():
        for field, ours, theirs in _differences(key, value, saved.get(key)):
            raise ValueError(
                f"{path}: {field} must be {ours} as in this run, got {theirs}; resume with the "
                "same setting or start in another run.dir"
            )


def _differences(field: str, ours: Any, theirs: Any) -> list[tuple[str, str, str]]:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return [
            found
            for key in ours | theirs
            for found in _differences(f"{field}.{key}", ours.get(key), theirs.get(key))
        ]
    if ours == theirs:
        return []
    return [(field, _in_words(ours), _in_words(theirs))]


def _in_words(value: Any) -> str:
    return "absent" if value is None else str(value)
