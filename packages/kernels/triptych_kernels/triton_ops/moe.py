# mypy: allow-untyped-defs
# (the arguments of a kernel are typed by Triton)
"""The element-wise parts of the mixture of experts on Triton; the op is in ../moe.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024  # with 4 warps each thread moves 8 elements: 16 bytes of bfloat16 per load


def combine(rows: Tensor, slots: Tensor, weights: Tensor | None) -> Tensor:
    """rows (S, H), slots (T, k), weights (T, k) or None for 1 -> (T, H), summed in float32.

    A slot of -1 adds nothing.
    """
    num_tokens, top_k = slots.shape
    width = rows.shape[1]
    y = torch.empty(num_tokens, width, dtype=rows.dtype, device=rows.device)
    if y.numel():
        _combine_kernel[(num_tokens, triton.cdiv(width, _BLOCK))](
            rows.contiguous(),
            slots.contiguous(),
            slots if weights is None else weights.contiguous(),
            y,
            width,
            TOP_K=top_k,
            WEIGHTED=weights is not None,
            BLOCK=_BLOCK,
        )
    return y


def activate_backward(
    pre: Tensor, d_hidden: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """pre (S, 2F), d_hidden (S, F), scale (S,) -> d_pre (S, 2F), hidden (S, F), d_scale (S,)."""
    num_rows, width = d_hidden.shape
    d_pre, hidden = torch.empty_like(pre), torch.empty_like(d_hidden)
    d_scale = torch.empty_like(scale)
    if num_rows:
        _activate_backward_kernel[(num_rows,)](
            pre,
            d_hidden,
            scale,
            d_pre,
            hidden,
            d_scale,
            width,
            BLOCK=min(_BLOCK, triton.next_power_of_2(width)),
        )
    return d_pre, hidden, d_scale


@triton.jit
def _combine_kernel(
    rows_ptr,
    slots_ptr,
    weights_ptr,
    y_ptr,
    width,
    TOP_K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < width
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for j in tl.static_range(TOP_K):
        slot = tl.load(slots_ptr + token * TOP_K + j)
        row = tl.load(rows_ptr + slot * width + col, mask=inside & (slot >= 0), other=0.0)
        row = row.to(tl.float32)
        if WEIGHTED:
            row *= tl.load(weights_ptr + token * TOP_K + j).to(tl.float32)
        total += row
    tl.store(y_ptr + token * width + col, total.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _activate_backward_kernel(
    pre_ptr,
    d_hidden_ptr,
    scale_ptr,
    d_pre_ptr,
    hidden_ptr,
    d_scale_ptr,
    width,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    pre_ptr += row * 2 * width
    d_pre_ptr += row * 2 * width
    d_hidden_ptr += row * width
    hidden_ptr += row * width
    scale = tl.load(scale_ptr + row)
    d_scale = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        col = start + tl.arange(0, BLOCK)
        inside = col < width
        gate = tl.load(pre_ptr + col, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(pre_ptr + width + col, mask=inside, other=0.0).to(tl.float32)
        d_hidden = tl.load(d_hidden_ptr + col, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        # the silu and the hidden that the forward used
        rounded = silu.to(hidden_ptr.dtype.element_ty).to(tl.float32)
        hidden = (rounded * up).to(hidden_ptr.dtype.element_ty).to(tl.float32)
        d_scale += d_hidden * hidden
        d_hidden *= scale
        # d silu / d gate = sigmoid * (1 + gate * (1 - sigmoid)) = sigmoid + silu * (1 - sigmoid)
        d_gate = d_hidden * up * (sigmoid + silu * (1.0 - sigmoid))
        tl.store(d_pre_ptr + col, d_gate.to(d_pre_ptr.dtype.element_ty), mask=inside)
        d_up = d_hidden * rounded
        tl.store(d_pre_ptr + width + col, d_up.to(d_pre_ptr.dtype.element_ty), mask=inside)
        weighted = hidden * scale
        tl.store(hidden_ptr + col, weighted.to(hidden_ptr.dtype.element_ty), mask=inside)
    tl.store(d_scale_ptr + row, tl.sum(d_scale, axis=0))
