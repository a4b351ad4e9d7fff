"""An exponential moving average of the weights, kept beside each fp32 master in the optimizer.

average <- average + (1 - d) (master - average) after every update, beginning with the master before
the first. Being a state like Adam's moments, of whatever stretch of whatever parameters a rank
holds, it needs no rank but its own, and is saved, cut anew and loaded as they are.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

AVERAGE = "average"  # its key in a master's state
COUNT = "averaged"  # updates that are in it

States = MutableMapping[Tensor, Any]


@dataclass(frozen=True)
class Ema:
    """How the average follows the masters.

    With `warmup` the decay of update t, counted from 0, is at most (1 + t) / (10 + t), as in
    TensorFlow's ExponentialMovingAverage and diffusers' EMAModel: a short run forgets its start.
    """

    decay: float
    warmup: bool = False

    @torch.no_grad()
    def begin(self, states: States, masters: Sequence[Tensor]) -> None:
        """Before an update: averages that are not there yet are the masters, fp32."""
        for master in masters:
            if AVERAGE not in states[master]:
                states[master][AVERAGE] = master.detach().clone()
                states[master][COUNT] = 0

    @torch.no_grad()
    def follow(self, states: States, masters: Sequence[Tensor], scale: Tensor | None) -> None:
        """After an update; where `scale`, () on the device, is not finite, it was left out."""
        by_count: dict[int, list[Tensor]] = {}
        for master in masters:
            by_count.setdefault(int(states[master][COUNT]), []).append(master)
        left_out = None if scale is None else (~scale.isfinite()).float()
        for count, some in by_count.items():
            averages = [states[master][AVERAGE] for master in some]
            _approach(averages, some, 1.0 - self.decay_at(count), left_out)
            for master in some:
                states[master][COUNT] = count + 1

    def decay_at(self, update: int) -> float:
        """Of an update, counted from 0."""
        if not self.warmup:
            return self.decay
        return min(self.decay, (1 + update) / (10 + update))


def _approach(
    averages: list[Tensor], masters: list[Tensor], weight: float, left_out: Tensor | None
) -> None:
    """averages += weight (masters - averages), of any number in one launch; not where left_out.

    A step of SGD down half the square of the difference, which torch has for many tensors and an
    answer that only the device knows; `lerp_` by such a weight takes six launches a tensor.
    """
    torch._fused_sgd_(
        averages,
        masters,
        [],
        weight_decay=-1.0,
        momentum=0.0,
        lr=-weight,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
        found_inf=left_out,
    )
