"""LayerNorm: y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias (arXiv 1607.06450)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .autograd import first_order
from .dispatch import choose, is_traced
from .rms_norm import check_weight


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor:
    """Normalise the last dimension to mean 0 and variance 1, then scale and shift it.

    x: (..., H); weight, bias: (H,) or None, for 1 and 0; returns (..., H) in x's dtype. The
    arithmetic is float32 (float64 for float64 x), rounded once at the end. The variance is the
    biased one. The first choice is "torch", F.layer_norm, which has fused kernels of its own; they
    were not timed against "triton", which rounds alike: one launch forward, two backward, H at most
    65536.

    Raises ValueError when weight or bias is not (H,).
    """
    for what, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            check_weight("layer_norm", x, parameter, what)
    name = choose("layer_norm", x, backend)
    if name == "torch":
        return _torch_layer_norm(x, weight, bias, eps)
    if name == "reference":
        return layer_norm_ref(x, weight, bias, eps)
    if is_traced(x):
        return _layer_norm(x, weight, bias, eps)[0]
    return _LayerNorm.apply(x, weight, bias, eps)


def layer_norm_ref(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """`layer_norm` in plain torch, which torch.compile may fuse with what is around it."""
    wide = x if x.dtype == torch.float64 else x.float()
    centred = wide - wide.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * weight.to(wide.dtype)
    y = y if bias is None else y + bias.to(wide.dtype)
    return y.to(x.dtype)


def _torch_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    if any(p is not None and p.dtype != x.dtype for p in (weight, bias)):
        # F.layer_norm on CUDA wants one dtype: widen them all, and round once as it would.
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = (None if p is None else p.to(wide) for p in (weight, bias))
        return F.layer_norm(x.to(wide), x.shape[-1:], weight, bias, eps).to(x.dtype)
    # .to: on CUDA autocast makes its result float32
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps).to(x.dtype)


class _LayerNorm(torch.autograd.Function):
    """The eager path: the same kernels as the custom op's, without its cost per call."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        from .triton_ops import layer_norm as kernels

        y, mean, rstd = kernels.forward(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        from .triton_ops import layer_norm as kernels

        x, weight, mean, rstd = ctx.saved_tensors
        gradients = kernels.backward(dy, x, weight, mean, rstd, ctx.bias_dtype is not None)
        return _as_inputs(gradients, weight, ctx.bias_dtype)


@torch.library.custom_op("triptych::layer_norm", mutates_args=())
def _layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """-> y (..., H), and mean and rstd (rows,) float32 for the backward."""
    from .triton_ops import layer_norm as kernels

    return kernels.forward(x, weight, bias, eps)


@_layer_norm.register_fake
def _(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)
    return x.new_empty(x.shape), mean, torch.empty_like(mean)


@torch.library.custom_op("triptych::layer_norm_backward", mutates_args=())
def _layer_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dx (..., H), dweight and dbias float32, (H,) or (0,) where there is none."""
    from .triton_ops import layer_norm as kernels

    dx, dweight, dbias = kernels.backward(dy, x, weight, mean, rstd, has_bias)
    return dx, dweight.clone(), dbias.clone()  # both are views of one tensor


@_layer_norm_backward.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dweight = x.new_empty(x.shape[-1] if weight is not None else 0, dtype=torch.float32)
    return x.new_empty(x.shape), dweight, dweight.new_empty(x.shape[-1] if has_bias else 0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, mean, rstd)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.mark_non_differentiable(mean, rstd)


def _differentiate(
    ctx: Any, dy: Tensor, d_mean: Tensor, d_rstd: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
    x, weight, mean, rstd = ctx.saved_tensors
    gradients = _layer_norm_backward(dy, x, weight, mean, rstd, ctx.bias_dtype is not None)
    return _as_inputs(gradients, weight, ctx.bias_dtype)


def _as_inputs(
    gradients: tuple[Tensor, Tensor, Tensor], weight: Tensor | None, bias_dtype: Any
) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
    """The gradients in the dtypes of the inputs, None where there was no input."""
    dx, dweight, dbias = gradients
    return (
        dx,
        None if weight is None else dweight.to(weight.dtype),
        None if bias_dtype is None else dbias.to(bias_dtype),
        None,
    )


_layer_norm.register_autograd(_differentiate, setup_context=_save)
