"""What of a run its checkpoints hold it to, and what may be another in a run that goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import nn

from triptych_core.checkpoint.fragments import kept_buffers
from triptych_core.config import StageConfig
from triptych_core.parallel.expert import whole_shape

FORMAT = 1  # of the files of a checkpoint

# What the files can be loaded without, if the user says so.
_ANYWAY = frozenset({"model"})


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
        "optimizer": config.optim.name,
        "trainable_parameters": trained,
        "frozen_parameters": frozen,
        "buffers": {name: str(tuple(buffer.shape)) for name, buffer in kept_buffers(module)},
        "model": module.fingerprint() if isinstance(module, Fingerprinted) else {},
    }


def check_identity(
    path: Path, saved: dict[str, Any], wanted: dict[str, Any], *, anyway: bool
) -> list[str]:
    """Compare what was saved in `path` with this run's; returns what differs and is let pass.

    Raises:
        ValueError: with the first field that differs, if it may not or not `anyway`.
    """
    wanted = json.loads(json.dumps(wanted))  # tuples are lists there, too
    saved = {"parallel.tensor": 1} | saved
    passed: list[str] = []
    for key, value in wanted.items():
        for field, ours, theirs in _differences(key, value, saved.get(key)):
            if key not in _ANYWAY or not anyway:
                remedy = ", or go on with checkpoint.resume_anyway=true" if key in _ANYWAY else ""
                raise ValueError(
                    f"{path}: {field} must be {_in_words(ours)} as in this run, got "
                    f"{_in_words(theirs)}; resume with the same setting or start in another run.dir"
                    f"{remedy}"
                )
            passed.append(field)
    return passed


def changes(saved: dict[str, Any], now: dict[str, Any]) -> dict[str, list[Any]]:
    """[was, is] of what of a tree of settings is another now, by dotted path."""
    return {field: [was, now] for field, now, was in _differences("", now, saved)}


def _differences(field: str, ours: Any, theirs: Any) -> list[tuple[str, Any, Any]]:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return [
            found
            for key in ours | theirs
            for found in _differences(
                f"{field}.{key}" if field else key, ours.get(key), theirs.get(key)
            )
        ]
    return [] if ours == theirs else [(field, ours, theirs)]


def _in_words(value: Any) -> str:
    return "absent" if value is None else str(value)
