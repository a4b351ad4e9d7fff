"""Checkpoints: complete or absent, and one format for every ZeRO stage and any number of ranks.

checkpoints/step-000100/
    state.json                 step, data position, versions, and what must match
    rank-00000.safetensors     each writer's share of masters, optimizer states, frozen, buffers
    random-00000.safetensors   each writer's generators
    manifest.json              size and SHA-256 of every file above
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch.distributed as dist

from triptych_core.checkpoint.folders import checkpoints
from triptych_core.checkpoint.fragments import stretches_to_save
from triptych_core.checkpoint.host_copy import HostCopy
from triptych_core.checkpoint.load import load_checkpoint, newest_whole
from triptych_core.checkpoint.save import take_snapshot, write_snapshot
from triptych_core.checkpoint.together import on_main
from triptych_core.config import StageConfig, is_due
from triptych_core.metrics import Metrics


class Resumable(Protocol):
    """The data iterator's half of the contract."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Guard(Protocol):
    """What else a checkpoint holds."""

    def state_dict(self) -> dict[str, Any]: ...


class Saver:
    """Saves every `checkpoint.every` steps and after the last, unless `checkpoint.save` is off.

    Called after every step. With `checkpoint.background` the device copies into host memory beside
    the next forward and backward, before the next update; a thread writes it. One is
    written at a time, the last is waited for.

    Args:
        engine: what is trained.
        config: of the run.
        batches: the data iterator.
        metrics: where it is said.
        guard: the loss guard's half of the same contract.
    """

    def __init__(
        self,
        engine: Any,
        config: StageConfig,
        batches: Resumable,
        metrics: Metrics,
        guard: Guard | None = None,
    ) -> None:
        self._engine, self._config = engine, config
        self._batches, self._metrics, self._guard = batches, metrics, guard
        self._host_copy: HostCopy | None = None
        self._writing: Future[Path] | None = None
        self._saved: int | None = None  # the last step that was
        self._reserved = False
        if config.checkpoint.save and config.checkpoint.background:
            self._host_copy = HostCopy()
            # The device copies during the next forward and backward: no update before it is done.
            inner = getattr(engine.optimizer, "optimizer", engine.optimizer)  # within DeepSpeed's
            inner.register_step_pre_hook(self._host_copy.before_change)
            self._thread = ThreadPoolExecutor(1, "checkpoint")
            # Its collectives must not come between those of the training.
            self._group = dist.new_group(backend="gloo")

    def __call__(self, step: int) -> None:
        """Begin to save if the step is due.

        Raises:
            ValueError: the disk is too full, or a rank could not write; the checkpoint before
                could not be written.
        """
        config = self._config
        if self._host_copy is not None and not self._reserved:
            self._reserve(self._host_copy, step)
        if self._writing is not None and self._writing.done() and not self._writing.exception():
            self._wait()
        if not config.checkpoint.save:
            return
        if not is_due(step, config.checkpoint.every, config.run.steps):
            return
        self._save(step, None if step == config.run.steps else self._host_copy)
        self._metrics.restart_clock()

    def save_now(self, step: int) -> None:
        """Save unless it is done already, and wait until it is; a run that ends early calls it."""
        if self._config.checkpoint.save and self._saved != step:
            self._save(step, None)
        self._wait()

    def _reserve(self, copy: HostCopy, step: int) -> None:
        """After the first step, which makes the optimizer's states, if a save in between is due."""
        self._reserved = True
        every, last = self._config.checkpoint.every, self._config.run.steps
        if any(is_due(later, every, last) for later in range(step, last)):
            stretches, _ = stretches_to_save(self._engine)
            copy.reserve(sum(stretch.num_bytes for stretch in stretches))

    def _save(self, step: int, copy: HostCopy | None) -> None:
        # Only here do all ranks look, at the same step, whether the one before came to an end.
        self._wait()
        # First: the guard may take back what the optimizer has counted.
        more = {"loss_guard": self._guard.state_dict()} if self._guard else {}
        data = self._batches.state_dict()
        snapshot = take_snapshot(self._engine, self._config, step, data, copy, more)
        if copy is None:
            self._say(write_snapshot(snapshot))
        else:
            self._writing = self._thread.submit(write_snapshot, snapshot, self._group)
        self._saved = step

    def _wait(self) -> None:
        if self._writing is not None:
            path, self._writing = self._writing.result(), None
            self._say(path)

    def _say(self, path: Path) -> None:
        self._metrics.note(f"saved {path}")


class Resumed(NamedTuple):
    """The last step already taken, 0 for a fresh start; for run.json what has changed since."""

    step: int = 0
    record: dict[str, Any] | None = None
    loss_guard: dict[str, Any] | None = None


def resume(engine: Any, config: StageConfig, batches: Resumable) -> Resumed:
    """Go on from the run's newest checkpoint that is whole, if there is any.

    It may have been saved by any number of ranks under any ZeRO stage. Learning rate, weight decay
    and Adam's constants are those of this run's configuration.

    Raises:
        ValueError: the folder has checkpoints and `checkpoint.resume` is never, none of them is
            whole, or the newest does not fit this run.
    """
    # One rank looks and all follow: another node's view of the folder may be stale.
    found = on_main(lambda: checkpoints(config.run.dir))
    if not found:
        return Resumed()
    if config.checkpoint.resume == "never":
        raise ValueError(
            "checkpoint.resume: must be auto where a run has checkpoints, got never with "
            f"{found[-1]}; choose another run.dir or remove the folder"
        )
    return go_on_from(engine, config, batches, newest_whole(found))


def go_on_from(engine: Any, config: StageConfig, batches: Resumable, path: Path) -> Resumed:
    """Go on from this checkpoint, which is whole. Raises ValueError where it does not fit."""
    loaded = load_checkpoint(engine, config, path)
    batches.load_state_dict(loaded.data)
    other_data = batches.state_dict().get("resumed_anyway")
    record = loaded.record | ({"data": other_data} if other_data else {})
    return Resumed(loaded.step, record, loaded.loss_guard)
