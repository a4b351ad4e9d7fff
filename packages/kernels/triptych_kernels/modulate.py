"""Adaptive modulation of diffusion transformers: y = x * (1 + scale) + shift.

DiT (Peebles and Xie, arXiv 2212.09748): x comes out of a norm without weights, shift and scale out
of the conditioning on time step and class or text. gate_add.py is its other half.
"""

from typing import Any

import torch
from torch import Tensor

from .autograd import first_order
from .conditioning import as_groups, spread
from .dispatch import choose, is_traced


def modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Scale x by 1 + scale and shift it, with conditioning per sample, document or token.

    x: (B, ..., H) with shift and scale (B, H) or (B, 1, ..., H), one per sample, or of x's shape,
    one per token; or x (T, H) with cu_seqlens (B + 1,), rising from 0 to T, and shift and scale
    (B, H), one per document. shift and scale have one dtype, which may differ from x's, and may
    be chunks of one projection. Returns x's shape and dtype. The arithmetic is float32 (float64
    for float64 x), rounded once. On CUDA: one launch forward, three backward.

    Raises ValueError when the shapes or dtypes do not fit.
    """
    _check_dtypes(shift, scale)
    shift = as_groups("modulate", "shift", shift, x, cu_seqlens)
    scale = as_groups("modulate", "scale", scale, x, cu_seqlens)
    if shift.shape != scale.shape:
        raise ValueError(
            f"modulate: shift and scale must have one shape, got {shift.shape[0]} and "
            f"{scale.shape[0]} rows; make them the same"
        )
    if choose("modulate", x, backend) == "reference":
        return _reference(x, shift, scale, cu_seqlens)
    if is_traced(x):
        return _modulate(x, shift, scale, cu_seqlens)
    return _Modulate.apply(x, shift, scale, cu_seqlens)


def modulate_ref(
    x: Tensor, shift: Tensor, scale: Tensor, *, cu_seqlens: Tensor | None = None
) -> Tensor:
    """`modulate` in plain torch, which torch.compile may fuse with what is around it."""
    shift = as_groups("modulate_ref", "shift", shift, x, cu_seqlens)
    scale = as_groups("modulate_ref", "scale", scale, x, cu_seqlens)
    return _reference(x, shift, scale, cu_seqlens)


def _reference(x: Tensor, shift: Tensor, scale: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    shift, scale = (spread(c.to(wide), x, cu_seqlens) for c in (shift, scale))
    return (x.to(wide) * (1.0 + scale) + shift).to(x.dtype)


def _check_dtypes(shift: Tensor, scale: Tensor) -> None:
    if shift.dtype != scale.dtype:
        raise ValueError(
            f"modulate: shift and scale must have one dtype, got {shift.dtype} and {scale.dtype}; "
            f"make them the same"
        )


class _Modulate(torch.autograd.Function):
    """The eager path: the same kernels as the custom op's, without its cost per call."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, cu_seqlens: Tensor | None
    ) -> Tensor:
        from .triton_ops import modulate as kernels

        ctx.save_for_backward(x, scale, cu_seqlens)
        return kernels.modulate_forward(x, shift, scale, cu_seqlens)

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        from .triton_ops import modulate as kernels

        return (*kernels.modulate_backward(dy, *ctx.saved_tensors), None)


@torch.library.custom_op("triptych::modulate", mutates_args=())
def _modulate(x: Tensor, shift: Tensor, scale: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    from .triton_ops import modulate as kernels

    return kernels.modulate_forward(x, shift, scale, cu_seqlens)


@_modulate.register_fake
def _(x: Tensor, shift: Tensor, scale: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("triptych::modulate_backward", mutates_args=())
def _modulate_backward(
    dy: Tensor, x: Tensor, scale: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dx (..., H), dshift and dscale (groups, H)."""
    from .triton_ops import modulate as kernels

    return kernels.modulate_backward(dy, x, scale, cu_seqlens)


@_modulate_backward.register_fake
def _(
    dy: Tensor, x: Tensor, scale: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), scale.new_empty(scale.shape), scale.new_empty(scale.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, scale, cu_seqlens = inputs
    ctx.save_for_backward(x, scale, cu_seqlens)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return (*_modulate_backward(dy, *ctx.saved_tensors), None)


_modulate.register_autograd(_differentiate, setup_context=_save)
