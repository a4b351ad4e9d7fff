"""The step that is run again: seen from within, and kept from changing anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from triptych_core.config import Stage
from triptych_core.faults.loss_guard import optimizer_of
from triptych_core.faults.oversight import Oversight
from triptych_core.replay.norms import gradient_norms


class LastLook(Oversight):
    """Oversight of a run that goes as far as `last_step`, and takes that one without an update.

    So a norm is the engine's own, and what the loss guard says of the step is what it said then.
    """

    last_step = 0
    norms: Mapping[str, Tensor] = {}
    """of the last step's gradients, () fp32 by parameter"""

    def expect(self, step: int, loss: Tensor, window: Sequence[dict[str, Any]]) -> None:
        """The last step's gradients are all there, and its update is to come."""
        super().expect(step, loss, window)
        if step == self.last_step:
            self.norms = gradient_norms(self.guard.engine)
            refuse_updates(self.guard.engine)


def refuse_updates(engine: Any) -> None:
    """From now on the optimizer is asked for updates that change nothing."""
    optimizer = optimizer_of(engine)
    ask = optimizer.ask

    def refuse(scale: Tensor | None) -> Tensor:
        if ask is not None:
            scale = ask(scale)
        return torch.full_like(torch.zeros(()) if scale is None else scale, torch.nan)

    optimizer.ask = refuse


def replayed_run(config: Stage, folder: Any) -> Stage:
    """The same run in a folder of its own: it saves nothing, and its loss guard does not end it."""
    guard = config.loss_guard
    mode = "skip" if guard.mode == "stop" else guard.mode
    return config.model_copy(
        deep=True,
        update={
            "run": config.run.model_copy(update={"dir": folder}),
            "checkpoint": config.checkpoint.model_copy(update={"save": False}),
            "loss_guard": guard.model_copy(update={"mode": mode, "max_in_a_row": 10**9}),
            "log": config.log.model_copy(update={"progress": False, "wandb": "off"}),
        },
    )


class Losses:
    """What a model made of each batch of samples: its loss and that of each sample, (N,).

    Args:
        model: gives a `loss_sum` and `losses`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.sums: list[Tensor] = []
        self.each: list[Tensor] = []
        self._handle = model.register_forward_hook(self._keep)

    def close(self) -> None:
        """Keep nothing any more."""
        self._handle.remove()

    def _keep(self, model: nn.Module, args: Any, output: Any) -> None:
        self.sums.append(output.loss_sum.detach())
        self.each.append(output.losses.detach())


class Heads:
    """What a model's head was given, pack by pack, and the loss that the model made of each.

    Args:
        model: gives a `loss_sum`.
        head: of it; takes hidden states (1, T, H), labels (1, T), their number, and what else
            the model gives it.
    """

    def __init__(self, model: nn.Module, head: nn.Module) -> None:
        self._head = head
        self.losses: list[Tensor] = []
        self._given: list[tuple[Any, ...]] = []
        self._handles = [
            head.register_forward_pre_hook(
                lambda _, args: self._given.append((args[0].detach(), *args[3:]))
            ),
            model.register_forward_hook(lambda *args: self.losses.append(args[2].loss_sum)),
        ]

    def close(self) -> None:
        """Keep nothing any more."""
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def loss_of(self, number: int, labels: Tensor) -> Tensor:
        """The head's summed loss on these labels, (1, T) int64, of pack `number`, () fp32."""
        given, *more = self._given[number]
        count = int((labels != -100).sum())
        loss: Tensor = self._head(given, labels.to(given.device), count, *more)
        return loss
