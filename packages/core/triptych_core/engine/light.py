"""The engine for ZeRO-0: every rank holds everything, and nothing stands between loss and update.

DeepSpeed's stage 0 sums up gradients in the weights' own dtype, steps its optimizer once while it
is being built, and keeps no norm; its stages 1–3 move every gradient through flat buffers even on
one rank. Here a single rank's gradients are updated from where autograd left them, in one launch
that also writes the low-precision weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from triptych_core.engine.gradient_sums import GradientSums
from triptych_core.optim.adamw import AdamW
from triptych_core.optim.clipping import clip_scale
from triptych_core.optim.muon import Muon
from triptych_core.optim.shards import whole_shards
from triptych_core.parallel.expert import norm_over_holders, replicas_of
from triptych_core.sections import EngineConfig


class LightEngine:
    """Data parallelism on whole replicas, with the parts of DeepSpeed's interface that we use.

    The optimizer's groups hold fp32 masters: copies of the weights, or the weights themselves where
    those are fp32. Gradients of several micro-steps, or ranks, are summed in `reduce_dtype`'s
    buckets; fp32 over micro-steps in any case.

    Args:
        model: on any device; it is moved to `device`.
        optimizer: over the model's parameters; its groups get the masters in their place.
        config: precision, accumulation and `reduce_dtype`.
        max_grad_norm: clip the global norm; 0 = never.
        device: of this rank.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: AdamW,
        config: EngineConfig,
        max_grad_norm: float,
        device: torch.device,
    ) -> None:
        self.module = model.to(device)
        self.optimizer = optimizer
        self.device = device
        self.micro_steps = config.gradient_accumulation_steps
        self.world_size = dist.get_world_size()
        self._max_grad_norm = max_grad_norm
        self._micro_step = 0
        self._norm: Tensor | None = None
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        self._broadcast()
        self.masters = {p: _master(p) for p in trained}
        for group in optimizer.param_groups:
            group["params"] = [self.masters[p] for p in group["params"]]
        optimizer.attach({m: p.data for p, m in self.masters.items() if m is not p})
        if isinstance(optimizer, Muon):
            optimizer.place(whole_shards(self.masters, optimizer.shapes))
        low = any(p.dtype != torch.float32 for p in trained)
        self._sums: GradientSums | None = None
        if self.world_size > 1 or (self.micro_steps > 1 and low):
            self._sums = GradientSums(
                # Gradients come about in the reverse of the order in which weights were made.
                [p for p in reversed(list(self.module.parameters())) if p in self.masters],
                torch.bfloat16 if low and config.reduce_dtype == "bf16" else torch.float32,
                self.micro_steps,
            )

    def __call__(self, **batch: Any) -> Any:
        return self.module(**batch)

    def train(self, mode: bool = True) -> None:
        """Switch the model to training."""
        self.module.train(mode)

    def eval(self) -> None:
        """Switch the model to evaluation."""
        self.module.eval()

    def backward(self, loss: Tensor, scale_wrt_gas: bool = False) -> None:
        """Add a micro-step's gradients to the step's, which are the mean over ranks."""
        assert not scale_wrt_gas, "losses are sums over a common divisor, never means of means"
        if self._sums is not None:
            self._sums.expect(
                is_first=self._micro_step == 0, is_last=self.is_gradient_accumulation_boundary()
            )
        (loss / self.world_size).backward()

    def step(self) -> None:
        """Count a micro-step; after the window's last, clip, update and forget the gradients."""
        is_last = self.is_gradient_accumulation_boundary()
        self._micro_step = (self._micro_step + 1) % self.micro_steps
        if not is_last:
            return
        gradients = self.gradients()
        self._norm = norm_over_holders(gradients)
        self.optimizer.step(
            gradients={self.masters[p]: gradient for p, gradient in gradients.items()},
            grad_scale=clip_scale(self._norm, self._max_grad_norm),
        )
        for parameter in self.masters:
            parameter.grad = None

    def gradients(self) -> Mapping[nn.Parameter, Tensor]:
        """The step's gradients after the last micro-step's backward; zeros where none came.

        They are of the weights' shapes, in the weights' dtype or that of their sums.
        """
        if self._sums is not None:
            return self._sums.finish()
        return {
            p: torch.zeros_like(p, memory_format=torch.contiguous_format)
            if p.grad is None
            else p.grad
            for p in self.masters
        }

    def get_global_grad_norm(self) -> Tensor | None:
        """The last step's gradient norm before clipping, on the device."""
        return self._norm

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the micro-step under way is the window's last."""
        return self._micro_step == self.micro_steps - 1

    def zero_optimization_stage(self) -> int:
        """Nothing is partitioned."""
        return 0

    @torch.no_grad()
    def refresh_weights(self) -> None:
        """Make the weights those of the masters, after these were changed from outside."""
        for parameter, master in self.masters.items():
            if master is not parameter:
                parameter.copy_(master)

    def destroy(self) -> None:
        """Let go of the hooks in the model."""
        if self._sums is not None:
            self._sums.remove()

    @torch.no_grad()
    def _broadcast(self) -> None:
        """Begin with rank 0's weights everywhere, whatever made them differ."""
        if self.world_size > 1:
            for tensor in [*self.module.parameters(), *self.module.buffers()]:
                dist.broadcast(tensor.data, group=replicas_of(tensor), group_src=0)


def _master(parameter: nn.Parameter) -> Tensor:
    if parameter.dtype == torch.float32:
        return parameter
    return parameter.detach().to(torch.float32)
