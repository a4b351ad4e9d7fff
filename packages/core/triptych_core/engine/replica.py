"""What a rank of ZeRO-0 holds: all masters, each of a whole parameter, and all gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from triptych_core.engine.gradient_sums import GradientSums
from triptych_core.optim.adamw import AdamW
from triptych_core.optim.shards import Flat, whole_masters
from triptych_core.parallel.expert import norm_over_holders
from triptych_core.sections import EngineConfig


class Replica:
    """A master for each parameter: a copy in fp32, or the weight itself where that is fp32.

    One rank's gradients of one micro-step stay where autograd left them; others are summed in
    buckets.

    Args:
        model: on its device, alike on every rank.
        optimizer: over the model's parameters; its groups get the masters in their place.
        config: precision, accumulation and `reduce_dtype`.
    """

    def __init__(self, model: nn.Module, optimizer: AdamW, config: EngineConfig) -> None:
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        self._masters = {p: _master(p) for p in trained}
        for group in optimizer.param_groups:
            group["params"] = [self._masters[p] for p in group["params"]]
        optimizer.attach({m: p.data for p, m in self._masters.items() if m is not p})
        low = any(p.dtype != torch.float32 for p in trained)
        several = config.gradient_accumulation_steps > 1
        self._sums: GradientSums | None = None
        if dist.get_world_size() > 1 or (several and low):
            self._sums = GradientSums(
                # Gradients come about in the reverse of the order in which weights were made.
                [p for p in reversed(list(model.parameters())) if p in self._masters],
                torch.bfloat16 if low and config.reduce_dtype == "bf16" else torch.float32,
                config.gradient_accumulation_steps,
            )

    def flats(self) -> Iterable[Flat]:
        """The masters and the parameters in them."""
        return whole_masters(self._masters)

    def frozen(self) -> Iterable[Flat]:
        """Of weights that do not train nothing is cut."""
        return ()

    @contextmanager
    def backward(self, *, is_first: bool, is_last: bool) -> Iterator[None]:
        """While a backward runs, of which is said where in the window it stands."""
        if self._sums is not None:
            self._sums.expect(is_first=is_first, is_last=is_last)
        yield

    def gradients(self) -> Mapping[Tensor, Tensor]:
        """By master, after the window's last backward; zeros where none came."""
        if self._sums is not None:
            return {self._masters[p]: gradient for p, gradient in self._sums.finish().items()}
        return {
            master: torch.zeros_like(p, memory_format=torch.contiguous_format)
            if p.grad is None
            else p.grad
            for p, master in self._masters.items()
        }

    def norm(self, gradients: Mapping[Tensor, Tensor]) -> Tensor:
        """The 2-norm of these gradients, by master, alike on every rank, () fp32."""
        masters = self._masters.items()
        return norm_over_holders({p: gradients[m] for p, m in masters if m in gradients})

    def spread(self) -> None:
        """Every rank has updated all weights itself."""
        for parameter in self._masters:
            parameter.grad = None

    def refresh(self) -> None:
        """Make the weights those of the masters, after these were changed from outside."""
        for parameter, master in self._masters.items():
            if master is not parameter:
                parameter.copy_(master)

    def whole(self, by_master: Mapping[Tensor, Tensor]) -> dict[nn.Parameter, Tensor]:
        """Tensors like some of the masters, by the parameter they belong to, in its shape."""
        return {p: by_master[m].view(p.shape) for p, m in self._masters.items() if m in by_master}

    def remove(self) -> None:
        """Let go of the hooks in the model."""
        if self._sums is not None:
            self._sums.remove()


def _master(parameter: nn.Parameter) -> Tensor:
    if parameter.dtype == torch.float32:
        return parameter
    return parameter.detach().to(torch.float32)
