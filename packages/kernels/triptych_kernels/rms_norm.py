"""RMSNorm: y = weight * x / sqrt(mean(x^2) + eps) (Zhang and Sennrich, arXiv 1910.07467)."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import choose, is_traced


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, *, backend: str | None = None) -> Tensor:
    """Normalise the last dimension to root mean square 1, then scale it by `weight`.

    x: (..., H); weight: (H,); returns (..., H) in x's dtype. The arithmetic is float32 (float64
    for float64 x), and x_hat is rounded to x's dtype before it meets the weight, as in the Llama
    and Qwen code of transformers. On CUDA: one launch forward, two backward, H at most 65536.

    Raises ValueError when weight is not (H,).
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(
            f"rms_norm: weight must be ({x.shape[-1]},), the last dimension of x, got "
            f"{tuple(weight.shape)}; build the norm with the width of its input"
        )
    if choose("rms_norm", x, backend) == "reference":
        return rms_norm_ref(x, weight, eps)
    if is_traced(x):
        return _rms_norm(x, weight, eps)[0]
    return _RMSNorm.apply(x, weight, eps)


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """`rms_norm` in plain torch."""
    wide = x if x.dtype == torch.float64 else x.float()
    x_hat = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (weight * x_hat.to(x.dtype)).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """The eager path: the same kernels as the custom op's, without its cost per call."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        from .triton_ops import rms_norm as kernels

        y, rstd = kernels.forward(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        from .triton_ops import rms_norm as kernels

        return (*kernels.backward(dy, *ctx.saved_tensors), None)


@torch.library.custom_op("triptych::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """-> y (..., H), and rstd (rows,) float32 for the backward."""
    from .triton_ops import rms_norm as kernels

    return kernels.forward(x, weight, eps)


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)


@torch.library.custom_op("triptych::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """-> dx (..., H) in x's dtype, dweight (H,) in weight's."""
    from .triton_ops import rms_norm as kernels

    return kernels.backward(dy, x, weight, rstd)


@_rms_norm_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(weight)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, dy: Tensor, d_rstd: Tensor) -> tuple[Tensor, Tensor, None]:
    dx, dweight = _rms_norm_backward(dy, *ctx.saved_tensors)
    return dx, dweight, None


_rms_norm.register_autograd(_differentiate, setup_context=_save)
