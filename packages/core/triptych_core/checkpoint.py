"""Checkpoints: complete or absent, and one format for every ZeRO stage and any number of ranks.

checkpoints/step-000100/
    state.json                 step, data position, versions, and what must match
    rank-00000.safetensors     each writer's share of masters, optimizer states, frozen, buffers
    random-00000.safetensors   each writer's generators
    manifest.json              size and SHA-256 of every file above
"""

from __future__ import annotations

from typing import Any, Protocol

from triptych_core.checkpoint_folders import checkpoints
from triptych_core.checkpoint_load import load_checkpoint, newest_whole
from triptych_core.checkpoint_save import save_checkpoint
from triptych_core.config import StageConfig, is_due
from triptych_core.metrics import Metrics
from triptych_core.together import on_main


class Resumable(Protocol):
    """The data iterator's half of the contract."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def save_if_due(
    engine: Any, config: StageConfig, batches: Resumable, metrics: Metrics, step: int
) -> None:
    """Save every `checkpoint.every` steps and after the last, unless `checkpoint.save` is off."""
    if config.checkpoint.save and is_due(step, config.checkpoint.every, config.run.steps):
        path = save_checkpoint(engine, config, step, batches.state_dict())
        metrics.note(f"step {step}  saved {path}")
        metrics.restart_clock()


def resume(engine: Any, config: StageConfig, batches: Resumable) -> int:
    """Go on from the run's newest checkpoint that is whole, if there is any.

    It may have been saved by any number of ranks under any ZeRO stage. Learning rate, weight decay
    and Adam's constants are those of this run's configuration. Returns the last step already taken;
    0 for a fresh start.

    Raises:
        ValueError: the folder has checkpoints and `checkpoint.resume` is never, none of them is
            whole, or the newest does not fit this run.
    """
    # One rank looks and all follow: another node's view of the folder may be stale.
    found = on_main(lambda: checkpoints(config.run.dir))
    if not found:
        return 0
    if config.checkpoint.resume == "never":
        raise ValueError(
            "checkpoint.resume: must be auto where a run has checkpoints, got never with "
            f"{found[-1]}; choose another run.dir or remove the folder"
        )
    step, data_state = load_checkpoint(engine, config, newest_whole(found))
    batches.load_state_dict(data_state)
    return step
