"""Short causal depthwise convolution over packed documents, the step before a DeltaNet's q, k, v.

    y[t, d] = bias[d] + sum_w weight[d, w] * x[t - (W - 1) + w, d], then silu where asked

with x = 0 before the first token of the document (Mamba, arXiv 2312.00752; Gated DeltaNet, arXiv
2412.06464). The fla backend is flash-linear-attention's Triton kernel.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .autograd import recording
from .dispatch import choose, is_traced
from .documents import check_cu_seqlens, position_of


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    cu_seqlens: Tensor,
    *,
    bias: Tensor | None = None,
    silu: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Convolve each channel with its own W last values, within each document of a packed row.

    x: (T, D); weight: (D, W), the tap of the current token last, as in `nn.Conv1d(D, D, W,
    groups=D).weight[:, 0]`; bias: (D,); cu_seqlens: (num_docs + 1,) int32 from 0 to T. Returns
    (T, D) in x's dtype. Sums are float32 (float64 for float64 x). The reference rounds to x's
    dtype before silu, as transformers does, and reads nothing on the host; fla rounds after it, and
    reads a cu_seqlens that it has not seen lately on the host.

    Raises ValueError for shapes that do not fit.
    """
    if x.dim() != 2 or weight.dim() != 2 or weight.shape[0] != x.shape[1] or not weight.shape[1]:
        raise ValueError(
            f"causal_conv1d: x must be (T, D) and weight (D, W) with W at least 1, got "
            f"{tuple(x.shape)} and {tuple(weight.shape)}; take a depthwise nn.Conv1d's weight[:, 0]"
        )
    if bias is not None and bias.shape != x.shape[1:]:
        raise ValueError(
            f"causal_conv1d: bias must be ({x.shape[1]},), one value a channel, got "
            f"{tuple(bias.shape)}; leave it out, or give one a channel"
        )
    check_cu_seqlens("causal_conv1d", cu_seqlens, x.shape[0])
    if choose("causal_conv1d", x, backend) == "reference":
        return causal_conv1d_ref(x, weight, cu_seqlens, bias=bias, silu=silu)
    if is_traced(x):
        return _causal_conv1d(x, weight, bias, cu_seqlens, silu)
    return _call_fla(x, weight, bias, cu_seqlens, silu)


def causal_conv1d_ref(
    x: Tensor,
    weight: Tensor,
    cu_seqlens: Tensor,
    *,
    bias: Tensor | None = None,
    silu: bool = False,
) -> Tensor:
    """`causal_conv1d` in plain torch: one shifted, masked product a tap."""
    wide = torch.promote_types(x.dtype, torch.float32)
    position = position_of(cu_seqlens, x.shape[0])
    last = weight.shape[1] - 1
    y = x.to(wide) * weight[:, last].to(wide)
    for back in range(1, last + 1):
        before = x.roll(back, 0).masked_fill((position < back)[:, None], 0)
        y = y + before.to(wide) * weight[:, last - back].to(wide)
    if bias is not None:
        y = y + bias.to(wide)
    return F.silu(y.to(x.dtype)) if silu else y.to(x.dtype)


def _call_fla(
    x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor, silu: bool
) -> Tensor:
    from fla.modules.causal_conv1d import causal_conv1d as fla_causal_conv1d

    y, _ = fla_causal_conv1d(
        x.unsqueeze(0), weight, bias, activation="silu" if silu else None, cu_seqlens=cu_seqlens
    )
    return y.squeeze(0)


@torch.library.custom_op("triptych::causal_conv1d", mutates_args=())
def _causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor, silu: bool
) -> Tensor:
    return _call_fla(x, weight, bias, cu_seqlens, silu)


@_causal_conv1d.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor, silu: bool) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("triptych::causal_conv1d_backward", mutates_args=())
def _causal_conv1d_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dx, dweight, dbias (empty without a bias). The forward, one cheap pass, runs again."""
    inputs = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
    with recording():
        y = _call_fla(
            inputs[0], inputs[1], inputs[2] if bias is not None else None, cu_seqlens, silu
        )
        gradients = torch.autograd.grad(y, inputs, dy)
    return gradients[0], gradients[1], gradients[2] if bias is not None else x.new_empty(0)


@_causal_conv1d_backward.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dbias = x.new_empty(0) if bias is None else torch.empty_like(bias)
    return x.new_empty(x.shape), torch.empty_like(weight), dbias


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.silu = inputs[4]


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, weight, bias, cu_seqlens = ctx.saved_tensors
    dx, dweight, dbias = _causal_conv1d_backward(dy, x, weight, bias, cu_seqlens, ctx.silu)
    return dx, dweight, None if bias is None else dbias, None, None


_causal_conv1d.register_autograd(_differentiate, setup_context=_save)
