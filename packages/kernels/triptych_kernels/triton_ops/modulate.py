# mypy: allow-untyped-defs
# (the arguments of a kernel are typed by Triton)
"""modulate and gate_add on Triton; the formulas and ops are in ../modulate.py and ../gate_add.py.

A program takes one group of tokens that share their conditioning, or one of the `splits` equal
parts of it, and some columns: it reads the conditioning once and sums its gradient in registers.
The splits depend on shapes alone, so the sums have the same bits each time.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .rms_norm import max_programs
from .rows import as_rows

_TILE = 4096  # elements of x that one program holds at a time
_PROGRAMS_PER_SM = 16


class _Plan(NamedTuple):
    groups: int
    tokens: int  # of each group, where all have the same
    width: int
    splits: int  # programs that share a group
    block_rows: int
    block_width: int
    num_warps: int


def modulate_forward(x: Tensor, shift: Tensor, scale: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """x (..., H), shift and scale (groups, H) -> x * (1 + scale) + shift."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel():
        rows, shift, scale = as_rows(x), as_rows(shift), as_rows(scale)
        plan = _plan(len(rows), len(scale), x.shape[-1], x.device)
        strides = (rows.stride(0), shift.stride(0), scale.stride(0))
        _run(_modulate_kernel, plan, (rows, shift, scale, y), strides, cu_seqlens)
    return y


def modulate_backward(
    dy: Tensor, x: Tensor, scale: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dx (..., H) in x's dtype, dshift and dscale (groups, H) in scale's."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not x.numel():
        return dx, torch.zeros_like(scale), torch.zeros_like(scale)
    dy, rows, scale = as_rows(dy), as_rows(x), as_rows(scale)
    plan = _plan(len(rows), len(scale), x.shape[-1], x.device)
    dshift, dscale = (_partial_sums(plan, x) for _ in range(2))
    strides = (dy.stride(0), rows.stride(0), scale.stride(0))
    tensors = (dy, rows, scale, dx, dshift, dscale)
    _run(_modulate_backward_kernel, plan, tensors, strides, cu_seqlens)
    return dx, dshift.sum(1).to(scale.dtype), dscale.sum(1).to(scale.dtype)


def gate_add_forward(
    residual: Tensor, x: Tensor, gate: Tensor, cu_seqlens: Tensor | None
) -> Tensor:
    """residual, x (..., H), gate (groups, H) -> residual + gate * x."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel():
        residual, rows, gate = as_rows(residual), as_rows(x), as_rows(gate)
        plan = _plan(len(rows), len(gate), x.shape[-1], x.device)
        strides = (residual.stride(0), rows.stride(0), gate.stride(0))
        _run(_gate_add_kernel, plan, (residual, rows, gate, y), strides, cu_seqlens)
    return y


def gate_add_backward(
    dy: Tensor, x: Tensor, gate: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """-> dx (..., H) in x's dtype, dgate (groups, H) in gate's."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not x.numel():
        return dx, torch.zeros_like(gate)
    dy, rows, gate = as_rows(dy), as_rows(x), as_rows(gate)
    plan = _plan(len(rows), len(gate), x.shape[-1], x.device)
    dgate = _partial_sums(plan, x)
    strides = (dy.stride(0), rows.stride(0), gate.stride(0))
    _run(_gate_add_backward_kernel, plan, (dy, rows, gate, dx, dgate), strides, cu_seqlens)
    return dx, dgate.sum(1).to(gate.dtype)


def _partial_sums(plan: _Plan, x: Tensor) -> Tensor:
    shape = (plan.groups, plan.splits, plan.width)
    return torch.empty(shape, dtype=torch.float32, device=x.device)


@cache
def _plan(num_rows: int, groups: int, width: int, device: torch.device) -> _Plan:
    # The block that leaves the fewest columns empty; of equals the widest.
    block_width = min((1024, 512, 256), key=lambda block: -(-width // block) * block)
    block_width = min(block_width, triton.next_power_of_2(width))
    tokens = -(-num_rows // groups)
    block_rows = min(_TILE // block_width, triton.next_power_of_2(tokens))
    columns = -(-width // block_width)
    wanted = -(-max_programs(device, _PROGRAMS_PER_SM) // (groups * columns))
    splits = min(wanted, -(-num_rows // block_rows))
    num_warps = min(4, max(1, block_rows * block_width // 256))
    return _Plan(groups, num_rows // groups, width, splits, block_rows, block_width, num_warps)


def _run(
    kernel,
    plan: _Plan,
    tensors: tuple[Tensor, ...],
    strides: tuple[int, int, int],
    cu_seqlens: Tensor | None,
) -> None:
    packed = cu_seqlens is not None
    launch(
        kernel,
        (plan.groups * plan.splits, -(-plan.width // plan.block_width), 1),
        (*tensors, tensors[0] if cu_seqlens is None else cu_seqlens),
        (0 if packed else plan.tokens, plan.width, plan.splits, *strides),
        (packed, plan.block_rows, plan.block_width),
        plan.num_warps,
    )


@triton.jit
def _rows(bounds_ptr, tokens, splits, PACKED: tl.constexpr):
    """-> the group of this program, and its first row and the one after its last."""
    group = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    if PACKED:
        start = tl.load(bounds_ptr + group).to(tl.int64)
        stop = tl.load(bounds_ptr + group + 1).to(tl.int64)
    else:
        start = group * tokens
        stop = start + tokens
    share = tl.cdiv(stop - start, splits)
    first = start + split * share
    return group, first, tl.minimum(first + share, stop)


@triton.jit
def _modulate_kernel(
    x_ptr,
    shift_ptr,
    scale_ptr,
    y_ptr,
    bounds_ptr,
    tokens,
    width,
    splits,
    x_stride,
    shift_stride,
    scale_stride,
    PACKED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    group, start, stop = _rows(bounds_ptr, tokens, splits, PACKED)
    col = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    shift = tl.load(shift_ptr + group * shift_stride + col, mask=col < width, other=0.0)
    scale = tl.load(scale_ptr + group * scale_stride + col, mask=col < width, other=0.0)
    shift = shift.to(tl.float32)
    scale = 1.0 + scale.to(tl.float32)
    for first in range(start, stop, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        inside = (row < stop)[:, None] & (col < width)[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=inside, other=0.0)
        y = x.to(tl.float32) * scale[None, :] + shift[None, :]
        tl.store(y_ptr + row[:, None] * width + col[None, :], y, mask=inside)


@triton.jit
def _modulate_backward_kernel(
    dy_ptr,
    x_ptr,
    scale_ptr,
    dx_ptr,
    dshift_ptr,
    dscale_ptr,
    bounds_ptr,
    tokens,
    width,
    splits,
    dy_stride,
    x_stride,
    scale_stride,
    PACKED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    group, start, stop = _rows(bounds_ptr, tokens, splits, PACKED)
    col = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    scale = tl.load(scale_ptr + group * scale_stride + col, mask=col < width, other=0.0)
    scale = 1.0 + scale.to(tl.float32)
    dshift = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=tl.float32)
    dscale = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=tl.float32)
    for first in range(start, stop, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        inside = (row < stop)[:, None] & (col < width)[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=inside, other=0.0)
        dy = tl.load(dy_ptr + row[:, None] * dy_stride + col[None, :], mask=inside, other=0.0)
        dy = dy.to(tl.float32)
        dshift += dy
        dscale += dy * x.to(tl.float32)
        tl.store(dx_ptr + row[:, None] * width + col[None, :], dy * scale[None, :], mask=inside)
    partial = tl.program_id(0).to(tl.int64) * width + col
    tl.store(dshift_ptr + partial, tl.sum(dshift, axis=0), mask=col < width)
    tl.store(dscale_ptr + partial, tl.sum(dscale, axis=0), mask=col < width)


@triton.jit
def _gate_add_kernel(
    residual_ptr,
    x_ptr,
    gate_ptr,
    y_ptr,
    bounds_ptr,
    tokens,
    width,
    splits,
    residual_stride,
    x_stride,
    gate_stride,
    PACKED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    group, start, stop = _rows(bounds_ptr, tokens, splits, PACKED)
    col = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    gate = tl.load(gate_ptr + group * gate_stride + col, mask=col < width, other=0.0)
    gate = gate.to(tl.float32)
    for first in range(start, stop, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        inside = (row < stop)[:, None] & (col < width)[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=inside, other=0.0)
        offsets = row[:, None] * residual_stride + col[None, :]
        residual = tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        y = residual + x.to(tl.float32) * gate[None, :]
        tl.store(y_ptr + row[:, None] * width + col[None, :], y, mask=inside)


@triton.jit
def _gate_add_backward_kernel(
    dy_ptr,
    x_ptr,
    gate_ptr,
    dx_ptr,
    dgate_ptr,
    bounds_ptr,
    tokens,
    width,
    splits,
    dy_stride,
    x_stride,
    gate_stride,
    PACKED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    group, start, stop = _rows(bounds_ptr, tokens, splits, PACKED)
    col = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    gate = tl.load(gate_ptr + group * gate_stride + col, mask=col < width, other=0.0)
    gate = gate.to(tl.float32)
    dgate = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=tl.float32)
    for first in range(start, stop, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        inside = (row < stop)[:, None] & (col < width)[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=inside, other=0.0)
        dy = tl.load(dy_ptr + row[:, None] * dy_stride + col[None, :], mask=inside, other=0.0)
        dy = dy.to(tl.float32)
        dgate += dy * x.to(tl.float32)
        tl.store(dx_ptr + row[:, None] * width + col[None, :], dy * gate[None, :], mask=inside)
    partial = tl.program_id(0).to(tl.int64) * width + col
    tl.store(dgate_ptr + partial, tl.sum(dgate, axis=0), mask=col < width)
