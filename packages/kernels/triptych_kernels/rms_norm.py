"""RMSNorm: y = weight * x / sqrt(mean(x^2) + eps) (Zhang and Sennrich, arXiv 1910.07467)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .autograd import first_order
from .dispatch import choose, is_traced


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    zero_centered: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Normalise the last dimension to root mean square 1, then scale it by `weight`.

    x: (..., H); weight: (H,); returns (..., H) in x's dtype. The arithmetic is float32 (float64
    for float64 x). As in the Llama and Qwen code of transformers, x_hat is rounded to x's dtype
    before it meets the weight. With `zero_centered` the scale is 1 + weight, and only the product
    is rounded, as in Gemma and Qwen3-Next. On CUDA: one launch forward, two backward, H at most
    65536.

    The backend "torch" is F.rms_norm, which rounds once: for half precision its results are not
    those of transformers' code, so it is taken on request only.

    Raises ValueError when weight is not (H,), or for the backend "torch" with `zero_centered`.
    """
    check_weight("rms_norm", x, weight)
    name = choose("rms_norm", x, backend)
    if name == "reference":
        return rms_norm_ref(x, weight, eps, zero_centered=zero_centered)
    if name == "torch":
        return _torch_rms_norm(x, weight, eps, zero_centered)
    if is_traced(x):
        return _rms_norm(x, weight, eps, zero_centered)[0]
    return _RMSNorm.apply(x, weight, eps, zero_centered)


def rms_norm_ref(
    x: Tensor, weight: Tensor, eps: float = 1e-6, *, zero_centered: bool = False
) -> Tensor:
    """`rms_norm` in plain torch, which torch.compile may fuse with what is around it."""
    wide = x if x.dtype == torch.float64 else x.float()
    x_hat = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if zero_centered:
        return (x_hat * (1.0 + weight.to(wide.dtype))).to(x.dtype)
    return (weight * x_hat.to(x.dtype)).to(x.dtype)


def check_weight(op: str, x: Tensor, weight: Tensor, what: str = "weight") -> None:
    """Raise ValueError unless weight is (H,) for x (..., H)."""
    if weight.shape != x.shape[-1:]:
        raise ValueError(
            f"{op}: {what} must be ({x.shape[-1]},), the last dimension of x, got "
            f"{tuple(weight.shape)}; build the norm with the width of its input"
        )


def _torch_rms_norm(x: Tensor, weight: Tensor, eps: float, zero_centered: bool) -> Tensor:
    if zero_centered:
        raise ValueError(
            "rms_norm: the backend of a zero-centred norm must be one that adds 1 to the weight "
            "in float32, got 'torch'; ask for 'triton' or 'reference'"
        )
    return F.rms_norm(x, weight.shape, weight, eps).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """The eager path: the same kernels as the custom op's, without its cost per call."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, zero_centered: bool) -> Tensor:
        from .triton_ops import rms_norm as kernels

        y, rstd = kernels.forward(x, weight, eps, zero_centered)
        ctx.save_for_backward(x, weight, rstd)
        ctx.zero_centered = zero_centered
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None, None]:
        from .triton_ops import rms_norm as kernels

        x, weight, rstd = ctx.saved_tensors
        dx, dweight = kernels.backward(dy, x, weight, rstd, ctx.zero_centered)
        return dx, dweight, None, None


@torch.library.custom_op("triptych::rms_norm", mutates_args=())
def _rms_norm(
    x: Tensor, weight: Tensor, eps: float, zero_centered: bool = False
) -> tuple[Tensor, Tensor]:
    """-> y (..., H), and rstd (rows,) float32 for the backward."""
    from .triton_ops import rms_norm as kernels

    return kernels.forward(x, weight, eps, zero_centered)


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float, zero_centered: bool = False) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)


@torch.library.custom_op("triptych::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, zero_centered: bool = False
) -> tuple[Tensor, Tensor]:
    """-> dx (..., H) in x's dtype, dweight (H,) in weight's."""
    from .triton_ops import rms_norm as kernels

    return kernels.backward(dy, x, weight, rstd, zero_centered)


@_rms_norm_backward.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, zero_centered: bool = False
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(weight)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, ctx.zero_centered = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, dy: Tensor, d_rstd: Tensor) -> tuple[Tensor, Tensor, None, None]:
    dx, dweight = _rms_norm_backward(dy, *ctx.saved_tensors, ctx.zero_centered)
    return dx, dweight, None, None


_rms_norm.register_autograd(_differentiate, setup_context=_save)
