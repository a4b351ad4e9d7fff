"""Gated residual of diffusion transformers: y = residual + gate * x (DiT, arXiv 2212.09748).

The gate comes out of the same conditioning as the shift and scale of modulate.py.
"""

from typing import Any

import torch
from torch import Tensor

from .autograd import first_order
from .conditioning import as_groups, spread
from .dispatch import choose, is_traced


def gate_add(
    residual: Tensor,
    x: Tensor,
    gate: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Add gate * x to `residual`, with a gate per sample, document or token.

    residual, x: (..., H) of one dtype; gate: as shift and scale of `modulate`, its dtype may
    differ. Returns that shape and dtype. The arithmetic is float32 (float64 for float64 x),
    rounded once. On CUDA: one launch forward, two backward.

    Raises ValueError when the shapes or dtypes do not fit.
    """
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"gate_add: residual and x must have one shape and dtype, got {tuple(residual.shape)} "
            f"{residual.dtype} and {tuple(x.shape)} {x.dtype}; make them the same"
        )
    gate = as_groups("gate_add", "gate", gate, x, cu_seqlens)
    if choose("gate_add", x, backend) == "reference":
        return _reference(residual, x, gate, cu_seqlens)
    if is_traced(x):
        return _gate_add(residual, x, gate, cu_seqlens)
    return _GateAdd.apply(residual, x, gate, cu_seqlens)


def gate_add_ref(
    residual: Tensor, x: Tensor, gate: Tensor, *, cu_seqlens: Tensor | None = None
) -> Tensor:
    """`gate_add` in plain torch, which torch.compile may fuse with what is around it."""
    groups = as_groups("gate_add_ref", "gate", gate, x, cu_seqlens)
    return _reference(residual, x, groups, cu_seqlens)


def _reference(residual: Tensor, x: Tensor, gate: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    per_token = spread(gate.to(wide), x, cu_seqlens)
    return (residual.to(wide) + per_token * x.to(wide)).to(x.dtype)


class _GateAdd(torch.autograd.Function):
    """The eager path: the same kernels as the custom op's, without its cost per call."""

    @staticmethod
    def forward(
        ctx: Any, residual: Tensor, x: Tensor, gate: Tensor, cu_seqlens: Tensor | None
    ) -> Tensor:
        from .triton_ops import modulate as kernels

        ctx.save_for_backward(x, gate, cu_seqlens)
        return kernels.gate_add_forward(residual, x, gate, cu_seqlens)

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        from .triton_ops import modulate as kernels

        return (dy, *kernels.gate_add_backward(dy, *ctx.saved_tensors), None)


@torch.library.custom_op("triptych::gate_add", mutates_args=())
def _gate_add(residual: Tensor, x: Tensor, gate: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    from .triton_ops import modulate as kernels

    return kernels.gate_add_forward(residual, x, gate, cu_seqlens)


@_gate_add.register_fake
def _(residual: Tensor, x: Tensor, gate: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("triptych::gate_add_backward", mutates_args=())
def _gate_add_backward(
    dy: Tensor, x: Tensor, gate: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """-> dx (..., H), dgate (groups, H)."""
    from .triton_ops import modulate as kernels

    return kernels.gate_add_backward(dy, x, gate, cu_seqlens)


@_gate_add_backward.register_fake
def _(dy: Tensor, x: Tensor, gate: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), gate.new_empty(gate.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, x, gate, cu_seqlens = inputs
    ctx.save_for_backward(x, gate, cu_seqlens)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return (dy, *_gate_add_backward(dy, *ctx.saved_tensors), None)


_gate_add.register_autograd(_differentiate, setup_context=_save)
