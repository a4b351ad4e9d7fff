"""Gated RMSNorm: y = weight * x / sqrt(mean(x^2) + eps) * silu(gate), the norm before the gate.

The output norm of gated delta networks (Qwen3-Next's RMSNormGated; Mamba-2, arXiv 2405.21060).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .autograd import first_order
from .dispatch import choose, is_traced
from .rms_norm import check_weight


def gated_rms_norm(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float = 1e-6, *, backend: str | None = None
) -> Tensor:
    """Normalise the last dimension as `rms_norm` does, then multiply by silu(gate).

    x, gate: (..., H), the dtypes may differ; weight: (H,); returns (..., H) in x's dtype. The
    arithmetic is float32, rounded where transformers' Qwen3-Next rounds: x_hat and weight * x_hat
    to x's dtype, silu(gate) not, and the product at the end. On CUDA: one launch forward, two
    backward, H at most 65536.

    Raises ValueError when gate has not x's shape or weight is not (H,).
    """
    if gate.shape != x.shape:
        raise ValueError(
            f"gated_rms_norm: gate must have the shape of x, {tuple(x.shape)}, got "
            f"{tuple(gate.shape)}; make them the same"
        )
    check_weight("gated_rms_norm", x, weight)
    if choose("gated_rms_norm", x, backend) == "reference":
        return gated_rms_norm_ref(x, gate, weight, eps)
    if is_traced(x):
        return _gated_rms_norm(x, gate, weight, eps)[0]
    return _GatedRMSNorm.apply(x, gate, weight, eps)


def gated_rms_norm_ref(x: Tensor, gate: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """`gated_rms_norm` in plain torch, which torch.compile may fuse with what is around it."""
    wide = x if x.dtype == torch.float64 else x.float()
    x_hat = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    scaled = weight * x_hat.to(x.dtype)
    return (scaled * F.silu(gate.to(wide.dtype))).to(x.dtype)


class _GatedRMSNorm(torch.autograd.Function):
    """The eager path: the same kernels as the custom op's, without its cost per call."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
        from .triton_ops import gated_rms_norm as kernels

        y, rstd = kernels.forward(x, gate, weight, eps)
        ctx.save_for_backward(x, gate, weight, rstd)
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        from .triton_ops import gated_rms_norm as kernels

        return (*kernels.backward(dy, *ctx.saved_tensors), None)


@torch.library.custom_op("triptych::gated_rms_norm", mutates_args=())
def _gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """-> y (..., H), and rstd (rows,) float32 for the backward."""
    from .triton_ops import gated_rms_norm as kernels

    return kernels.forward(x, gate, weight, eps)


@_gated_rms_norm.register_fake
def _(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)


@torch.library.custom_op("triptych::gated_rms_norm_backward", mutates_args=())
def _gated_rms_norm_backward(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dx, dgate (..., H), dweight (H,), each in its input's dtype."""
    from .triton_ops import gated_rms_norm as kernels

    return kernels.backward(dy, x, gate, weight, rstd)


@_gated_rms_norm_backward.register_fake
def _(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), gate.new_empty(gate.shape), torch.empty_like(weight)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, dy: Tensor, d_rstd: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return (*_gated_rms_norm_backward(dy, *ctx.saved_tensors), None)


_gated_rms_norm.register_autograd(_differentiate, setup_context=_save)
