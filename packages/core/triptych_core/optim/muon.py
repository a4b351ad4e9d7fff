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
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from triptych_core.optim.adamw import AdamW, Gradients
from triptych_core.optim.exchange import MAX_ELEMENTS, Exchange, plan_exchanges, work_on
from triptych_core.optim.shards import Shape, Shard

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
        for masters in _waves([m for m in group["params"] if m in self._exchanges]):
            buffers = [self._momentum(master) for master in masters]
            found = [gradients.get(m, m.grad) for m in masters]
            wide = [_wide(g, b, grad_scale) for g, b in zip(found, buffers, strict=True)]
            lr = group["lr"] if grad_scale is None else group["lr"] * grad_scale.isfinite()
            self._step_matrices(masters, buffers, wide, lr, group)

    def _momentum(self, master: Tensor) -> Tensor:
        if "momentum_buffer" not in self.state[master]:
            self.state[master]["momentum_buffer"] = torch.zeros_like(master)
        buffer: Tensor = self.state[master]["momentum_buffer"]
        return buffer

    def _step_matrices(
        self,
        masters: list[Tensor],
        buffers: list[Tensor],
        gradients: list[Tensor],
        lr: float | Tensor,
        group: dict[str, Any],
    ) -> None:
        """lr is on the device, and 0 where the step is left out, if gradients are scaled."""
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        updates = gradients  # in their place, since nobody reads them after the step
        if group["nesterov"]:
            torch._foreach_lerp_(updates, buffers, group["momentum"])
        else:
            torch._foreach_copy_(updates, buffers)
        scale = _SCALES[group["lr_scale"]]
        self._make_orthogonal(
            masters,
            updates,
            lambda stack: self._orthogonalise(stack) * (-lr * scale(*stack.shape[-2:])),
        )
        torch._foreach_mul_(masters, 1 - lr * group["weight_decay"])
        torch._foreach_add_(masters, updates)
        copied = [master for master in masters if master in self._copies]
        if copied:
            torch._foreach_copy_([self._copies[master] for master in copied], copied)

    def _make_orthogonal(
        self, masters: list[Tensor], updates: list[Tensor], function: Orthogonalise
    ) -> None:
        """All whole matrices of the wave in stacks of one shape; then those that are cut."""
        flats = {master: update.view(-1) for master, update in zip(masters, updates, strict=True)}
        pairs = [(flats[master], each) for master in masters for each in self._exchanges[master]]
        whole = [
            matrix for flat, each in pairs if each.is_whole for matrix in each.own_matrices(flat)
        ]
        work_on(whole, function)
        for flat, each in pairs:
            if not each.is_whole:
                each.apply(flat, function)


def _wide(gradient: Tensor | None, buffer: Tensor, scale: Tensor | None) -> Tensor:
    """A gradient like its momentum; that itself, which keeps it as it is, for an infinite one."""
    if gradient is None:
        return torch.zeros_like(buffer)
    gradient = gradient.to(buffer.dtype).view_as(buffer)
    return gradient if scale is None else torch.where(scale.isfinite(), gradient * scale, buffer)


def _waves(masters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Masters of like shapes side by side, so many at once as bound what a step holds beside them.

    A master that ZeRO made of many parameters is a wave of its own.
    """
    wave: list[Tensor] = []
    for master in sorted(masters, key=lambda m: tuple(m.shape)):
        if wave and sum(m.numel() for m in wave) + master.numel() > 4 * MAX_ELEMENTS:
            yield wave
            wave = []
        wave.append(master)
    if wave:
        yield wave
