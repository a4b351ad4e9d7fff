"""Residual addition and RMSNorm in one pass: s = x + residual, y = rms_norm(s, weight, eps).

The formula of the norm is that of rms_norm.py. Fused, the sum is written once and not read again.
"""

from typing import Any

import torch
from torch import Tensor

from .autograd import first_order
from .dispatch import choose, is_traced
from .rms_norm import check_weight, rms_norm_ref


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    zero_centered: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Add `residual` to x, and normalise the sum: (rms_norm(x + residual), x + residual).

    x, residual: (..., H) of one dtype; weight: (H,); returns two tensors (..., H) in that dtype:
    the normed one, which enters the next block, and the sum, which is the next residual. The sum
    is rounded before it is normalised, so both are what the two steps give one after the other.
    `zero_centered` and the rounding of the norm are rms_norm's.

    Raises ValueError when the shapes or dtypes of x and residual differ, or weight is not (H,).
    """
    if x.shape != residual.shape or x.dtype != residual.dtype:
        raise ValueError(
            f"add_rms_norm: x and residual must have one shape and dtype, got {tuple(x.shape)} "
            f"{x.dtype} and {tuple(residual.shape)} {residual.dtype}; make them the same"
        )
    check_weight("add_rms_norm", x, weight)
    if choose("add_rms_norm", x, backend) == "reference":
        return add_rms_norm_ref(x, residual, weight, eps, zero_centered=zero_centered)
    if is_traced(x):
        return _add_rms_norm(x, residual, weight, eps, zero_centered)[:2]
    return _AddRMSNorm.apply(x, residual, weight, eps, zero_centered)


def add_rms_norm_ref(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, *, zero_centered: bool = False
) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` in plain torch, which torch.compile may fuse with what is around it."""
    summed = x + residual
    return rms_norm_ref(summed, weight, eps, zero_centered=zero_centered), summed


class _AddRMSNorm(torch.autograd.Function):
    """The eager path: the same kernels as the custom op's, without its cost per call."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float, zero_centered: bool
    ) -> tuple[Tensor, Tensor]:
        from .triton_ops import rms_norm as kernels

        y, summed, rstd = kernels.add_forward(x, residual, weight, eps, zero_centered)
        ctx.save_for_backward(summed, weight, rstd)
        ctx.zero_centered = zero_centered
        return y, summed

    @staticmethod
    @first_order
    def backward(
        ctx: Any, dy: Tensor, dsummed: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        from .triton_ops import rms_norm as kernels

        summed, weight, rstd = ctx.saved_tensors
        dx, dweight = kernels.backward(dy, summed, weight, rstd, ctx.zero_centered, dsummed)
        return dx, dx, dweight, None, None


@torch.library.custom_op("triptych::add_rms_norm", mutates_args=())
def _add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, zero_centered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """-> y and x + residual (..., H), and rstd (rows,) float32 for the backward."""
    from .triton_ops import rms_norm as kernels

    return kernels.add_forward(x, residual, weight, eps, zero_centered)


@_add_rms_norm.register_fake
def _(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, zero_centered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rstd = x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape), rstd


@torch.library.custom_op("triptych::add_rms_norm_backward", mutates_args=())
def _add_rms_norm_backward(
    dy: Tensor, dsummed: Tensor, summed: Tensor, weight: Tensor, rstd: Tensor, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    """-> the gradient (..., H) of x and of residual alike, dweight (H,)."""
    from .triton_ops import rms_norm as kernels

    return kernels.backward(dy, summed, weight, rstd, zero_centered, dsummed)


@_add_rms_norm_backward.register_fake
def _(
    dy: Tensor, dsummed: Tensor, summed: Tensor, weight: Tensor, rstd: Tensor, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    return summed.new_empty(summed.shape), torch.empty_like(weight)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, _, weight, _, ctx.zero_centered = inputs
    ctx.save_for_backward(output[1], weight, output[2])
    ctx.mark_non_differentiable(output[2])


def _differentiate(
    ctx: Any, dy: Tensor, dsummed: Tensor, d_rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor, None, None]:
    dx, dweight = _add_rms_norm_backward(dy, dsummed, *ctx.saved_tensors, ctx.zero_centered)
    return dx, dx, dweight, None, None


_add_rms_norm.register_autograd(_differentiate, setup_context=_save)
