"""Deferred logits that are a torch.Tensor, for code that looks whether they are one.

A Trainer that evaluates hands a model's outputs to functions that take tensors alone. Without
gradients there is no graph to keep, so there the outputs may hold this class. It cannot stand in
for DeferredLogits itself: torch.compile does not trace the making of a tensor subclass, and DDP,
FSDP and DeepSpeed hang hooks on every tensor in the outputs of a training step.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .deferred_logits import DeferredLogits


class LogitsOnDemand(Tensor):
    """(..., V) logits, computed by whatever reads more than their shape, dtype and device."""

    deferred: DeferredLogits

    @staticmethod
    def __new__(cls, deferred: DeferredLogits) -> "LogitsOnDemand":
        made = Tensor._make_wrapper_subclass(
            cls, deferred.shape, dtype=deferred.dtype, device=deferred.device
        )
        made.deferred = deferred
        return made

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in _KNOWN:
            return super().__torch_function__(func, types, args, kwargs or {})
        return func(*_values(args), **_values(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return func(*_values(args), **_values(kwargs or {}))


def readable(outputs: Any) -> Any:
    """A model's outputs, a tensor in the place of deferred logits; others as they are."""
    if isinstance(outputs, DeferredLogits):
        return LogitsOnDemand(outputs)
    if type(outputs) in (tuple, list):
        return type(outputs)(map(readable, outputs))
    if isinstance(outputs, dict):  # as the outputs of transformers are
        for name, value in list(outputs.items()):
            if isinstance(value, DeferredLogits):
                outputs[name] = LogitsOnDemand(value)
    return outputs


# What needs no values.
_KNOWN = {
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.is_floating_point,
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "requires_grad")
    ),
}


def _values(arguments: Any) -> Any:
    with torch.no_grad():
        return tree_map_only(LogitsOnDemand, lambda x: x.deferred.tensor(), arguments)
