"""Short causal depthwise convolution over packed documents, the step before a DeltaNet's q, k, v.

    y[t, d] = bias[d] + sum_w weight[d, w] * x[t - (W - 1) + w, d], then silu where asked

with x = 0 before the first token of the document (Mamba, arXiv 2312.00752; Gated DeltaNet, arXiv
2412.06464). The Triton backend reads x once forward, x and dy once backward; the fla backend is
flash-linear-attention's kernel.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .autograd import first_order
from .dispatch import choose, is_traced
from .documents import check_cu_seqlens, position_of
from .recompute import recomputed_gradients


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    cu_seqlens: Tensor,
    *,
    bias: Tensor | None = None,
    silu: bool = False,
    widths: Sequence[int] | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Convolve each channel with its own W last values, within each document of a packed row.

    x: (T, D), any row stride; weight: (D, W), the tap of the current token last, as in
    `nn.Conv1d(D, D, W, groups=D).weight[:, 0]`; bias: (D,); cu_seqlens: (num_docs + 1,) int32 from
    0 to T. Returns (T, D) in x's dtype, or with widths, which add up to D, a tuple of (T, width)
    each, what `split(widths, -1)` gives: Triton writes each as a tensor of its own, contiguous.

    Sums are float32 (float64 for float64 x). The reference rounds to x's dtype before silu, as
    transformers does; Triton and fla round after it. fla alone reads on the host, a cu_seqlens that
    it has not seen lately.

    Raises ValueError for shapes that do not fit.
    """
    _check(x, weight, bias, widths)
    check_cu_seqlens("causal_conv1d", cu_seqlens, x.shape[0])
    name = choose("causal_conv1d", x, backend)
    if name == "triton":
        cut = [x.shape[1]] if widths is None else list(widths)
        run = _causal_conv1d if is_traced(x) else _CausalConv1d.apply
        parts = run(x, weight, bias, position_of(cu_seqlens, x.shape[0]), silu, cut)
        return parts[0] if widths is None else tuple(parts)
    if name == "reference":
        y = causal_conv1d_ref(x, weight, cu_seqlens, bias=bias, silu=silu)
    else:
        y = (_causal_conv1d_fla if is_traced(x) else _call_fla)(x, weight, bias, cu_seqlens, silu)
    return y if widths is None else y.split(list(widths), -1)


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


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, widths: Sequence[int] | None) -> None:
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
    if widths is not None and (sum(widths) != x.shape[1] or any(width < 1 for width in widths)):
        raise ValueError(
            f"causal_conv1d: widths must be positive and add up to {x.shape[1]}, got "
            f"{list(widths)}; give the widths of the parts that y falls into"
        )


class _CausalConv1d(torch.autograd.Function):
    """The eager path: the same kernels as the custom op's, without its cost per call."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        position: Tensor,
        silu: bool,
        widths: list[int],
    ) -> tuple[Tensor, ...]:
        from .triton_ops import causal_conv1d as kernels

        ctx.save_for_backward(x, weight, bias, position)
        ctx.silu = silu
        return tuple(kernels.forward(x, weight, bias, position, silu, widths))

    @staticmethod
    @first_order
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        from .triton_ops import causal_conv1d as kernels

        x, weight, bias, position = ctx.saved_tensors
        gradients = kernels.backward(dys, x, weight, bias, position, ctx.silu)
        return (*gradients, None, None, None)


@torch.library.custom_op("triptych::causal_conv1d", mutates_args=())
def _causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor,
    silu: bool,
    widths: list[int],
) -> list[Tensor]:
    """position (T,), of each token within its document -> the parts of y, (T, width) each."""
    from .triton_ops import causal_conv1d as kernels

    return kernels.forward(x, weight, bias, position, silu, widths)


@_causal_conv1d.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor,
    silu: bool,
    widths: list[int],
) -> list[Tensor]:
    return [x.new_empty(x.shape[0], width) for width in widths]


@torch.library.custom_op("triptych::causal_conv1d_backward", mutates_args=())
def _causal_conv1d_backward(
    dys: list[Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dx, dweight, dbias (empty without a bias)."""
    from .triton_ops import causal_conv1d as kernels

    dx, dweight, dbias = kernels.backward(dys, x, weight, bias, position, silu)
    return dx, dweight, x.new_empty(0) if dbias is None else dbias


@_causal_conv1d_backward.register_fake
def _(
    dys: list[Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dbias = x.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Of both nodes: the third tensor is a bias or none, the fourth says where documents begin."""
    ctx.save_for_backward(*inputs[:4])
    ctx.silu = inputs[4]


def _differentiate(ctx: Any, dys: list[Tensor]) -> tuple[Any, ...]:
    x, weight, bias, position = ctx.saved_tensors
    dx, dweight, dbias = _causal_conv1d_backward(dys, x, weight, bias, position, ctx.silu)
    return dx, dweight, None if bias is None else dbias, None, None, None


_causal_conv1d.register_autograd(_differentiate, setup_context=_save)


def _call_fla(
    x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor, silu: bool
) -> Tensor:
    from fla.modules.causal_conv1d import causal_conv1d as fla_causal_conv1d

    y, _ = fla_causal_conv1d(
        x.unsqueeze(0), weight, bias, activation="silu" if silu else None, cu_seqlens=cu_seqlens
    )
    return y.squeeze(0)


@torch.library.custom_op("triptych::causal_conv1d_fla", mutates_args=())
def _causal_conv1d_fla(
    x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor, silu: bool
) -> Tensor:
    return _call_fla(x, weight, bias, cu_seqlens, silu)


@_causal_conv1d_fla.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor, silu: bool) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("triptych::causal_conv1d_fla_backward", mutates_args=())
def _causal_conv1d_fla_backward(
    dy: Tensor, tensors: list[Tensor], cu_seqlens: Tensor, silu: bool
) -> list[Tensor]:
    """-> the gradient of each of `tensors`: x, weight and, where given, bias."""

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return _call_fla(x, weight, bias, cu_seqlens, silu)

    return recomputed_gradients(forward, tensors, [dy])


@_causal_conv1d_fla_backward.register_fake
def _(dy: Tensor, tensors: list[Tensor], cu_seqlens: Tensor, silu: bool) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in tensors]


def _differentiate_fla(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    *tensors, cu_seqlens = ctx.saved_tensors
    given = [x for x in tensors if x is not None]
    gradients = _causal_conv1d_fla_backward(dy, given, cu_seqlens, ctx.silu)
    return (*gradients, *[None] * (5 - len(gradients)))


_causal_conv1d_fla.register_autograd(_differentiate_fla, setup_context=_save)
