"""Settling what the configuration leaves open: `engine.zero.stage` and `engine.checkpointing`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

from triptych_core.checkpoint.together import on_main
from triptych_core.config import StageConfig
from triptych_core.plan.plan import Plan, with_choice

Stage = TypeVar("Stage", bound=StageConfig)


def settle(config: Stage, plan: Callable[[Stage], Plan]) -> tuple[Stage, str | None]:
    """The configuration with nothing left open, and one line that says why it is as it is.

    The main rank plans and all follow, also where that raises. A run that has a checkpoint is
    planned like any other: its files are read under every stage. None for a configuration that left
    nothing open.
    """
    if "auto" not in (config.engine.zero.stage, config.engine.checkpointing):
        return config, None
    stage, checkpointing, why = on_main(partial(_choose, config, plan))
    return with_choice(config, stage, checkpointing), why


def _choose(config: Stage, plan: Callable[[Stage], Plan]) -> tuple[int, str, str]:
    made = plan(config)
    chosen = made.chosen or min(made.choices, key=lambda choice: choice.memory.peak)
    return chosen.stage, chosen.checkpointing, made.why()
