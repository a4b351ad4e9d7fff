"""Muon under ZeRO: whole matrices are put together, made orthogonal, and cut up again.

B <- mu B + (1 - mu) G;  U = newton_schulz((1 - mu) G + mu B);  W <- (1 - lr wd) W - lr s U

The same update as `triptych_kernels.Muon` (Keller Jordan's Muon with Moonlight's weight decay and
scale, arXiv 2502.16982) on flat fp32 masters of which each rank holds a stretch. G has been
averaged, unscaled and clipped before: by one norm over all gradients, of Muon's and AdamW's.

DeepSpeed 0.19.8 has a Muon of its own that takes the norm over the orthogonalised updates instead:
each matrix of rank r counts as about sqrt(r) there, so that clipping scales all updates down, and
AdamW's gradients with them. Here DeepSpeed sees an ordinary optimizer of flat tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from triptych_core.adamw import AdamW, Gradients
from triptych_core.exchange import Exchange, plan_exchanges
from triptych_core.shards import Shape, Shard

Orthogonalise = Callable[[Tensor], Tensor]

# The factor on the learning rate for a matrix (M, N).
_SCALES: dict[str, Callable[[int, int], float]] = {
    "original": lambda m, n: math.sqrt(max(1.0, m / n)),
    "match_rms_adamw": lambda m, n: 0.2 * math.sqrt(max(m, n)),
}


class Muon(AdamW):
    """Muon for groups with `rule` muon and AdamW for the rest, on masters cut by ZeRO.

    A Muon group has `momentum`, `nesterov`, `lr_scale`, and `matrices`: for each of its parameters
    the shapes of the matrices it holds, end to end. `place` must be called once DeepSpeed has cut
    the parameters; a step before that leaves Muon's groups alone.

    Args:
        groups: parameter groups.
        orthogonalise: (B, M, N) -> (B, M, N), each matrix by itself.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], orthogonalise: Orthogonalise, **adamw: Any
    ) -> None:
        groups = list(groups)
        self.shapes: dict[int, Sequence[Shape]] = {}
        for group in groups:
            for parameter, shapes in zip(group["params"], group.pop("matrices", ()), strict=False):
                self.shapes[id(parameter)] = shapes
        super().__init__(groups, **adamw)
        self._orthogonalise = orthogonalise
        self._exchanges: dict[Tensor, list[Exchange]] = {}

    def place(self, shards: Iterable[Shard]) -> None:
        """Learn where matrices lie; alike on every rank, as it decides who sends what to whom."""
        self._exchanges = {shard.master: plan_exchanges(shard) for shard in shards}

    def _step_group(
        self, group: dict[str, Any], gradients: Gradients, grad_scale: Tensor | None
    ) -> None:
        """Every rank must come with the same groups."""
        if group.get("rule") != "muon":
            super()._step_group(group, gradients, grad_scale)
            return
        for master in group["params"]:
            if master in self._exchanges:
                gradient = gradients.get(master, master.grad)
                self._step_matrices(master, _wide(gradient, master, grad_scale), group)

    def _step_matrices(self, master: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        if "momentum_buffer" not in self.state[master]:
            self.state[master]["momentum_buffer"] = torch.zeros_like(master)
        buffer = self.state[master]["momentum_buffer"]
        buffer.lerp_(gradient, 1 - group["momentum"])
        # In the gradient's place, which nobody reads after the step.
        update = gradient.lerp_(buffer, group["momentum"]) if group["nesterov"] else buffer.clone()
        flat = update.view(-1)
        for exchange in self._exchanges[master]:
            exchange.apply(flat, lambda stack: self._scaled(stack, group["lr_scale"]))
        master.mul_(1 - group["lr"] * group["weight_decay"])
        master.add_(update, alpha=-group["lr"])
        if master in self._copies:
            self._copies[master].copy_(master)

    def _scaled(self, stack: Tensor, rule: str) -> Tensor:
        return self._orthogonalise(stack) * _SCALES[rule](*stack.shape[-2:])


def _wide(gradient: Tensor | None, master: Tensor, scale: Tensor | None) -> Tensor:
    """A gradient like its master; the very tensor where nothing has to be done to it."""
    if gradient is None:
        return torch.zeros_like(master)
    gradient = gradient.to(master.dtype).view_as(master)
    return gradient if scale is None else gradient * scale
