# mypy: allow-untyped-defs
# (the arguments of a kernel are typed by Triton)
"""Gated RMSNorm on Triton; the formula and the op are in ../gated_rms_norm.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .partials import add_partials
from .rms_norm import max_programs, tile_of
from .rows import as_rows

_TILE = 2048  # half of rms_norm's: the gate needs registers too
_PROGRAMS_PER_SM = 4


def forward(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, gate (..., H), weight (H,) -> y (..., H), rstd (rows,) float32."""
    rows, gate_rows = as_rows(x), as_rows(gate)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    rstd = torch.empty(x.shape[:-1].numel(), dtype=torch.float32, device=x.device)
    if rows.numel():
        num_rows, width = rows.shape
        block_rows, block_width, num_warps = tile_of(width, _TILE)
        launch(
            _forward_kernel,
            (-(-num_rows // block_rows), 1, 1),
            (rows, gate_rows, weight.contiguous(), y, rstd),
            (num_rows, width, rows.stride(0), gate_rows.stride(0), float(eps)),
            (block_rows, block_width),
            num_warps,
        )
    return y, rstd


def backward(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dx, dgate (..., H), dweight (H,), each in its input's dtype; the same bits each time."""
    rows, gate_rows, dy_rows = as_rows(x), as_rows(gate), as_rows(dy)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dgate = torch.empty_like(gate, memory_format=torch.contiguous_format)
    if not rows.numel():
        return dx, dgate, torch.zeros_like(weight)
    num_rows, width = rows.shape
    block_rows, block_width, num_warps = tile_of(width, _TILE)
    num_programs = min(-(-num_rows // block_rows), max_programs(x.device, _PROGRAMS_PER_SM))
    partials = torch.empty(num_programs, width, dtype=torch.float32, device=x.device)
    launch(
        _backward_kernel,
        (num_programs, 1, 1),
        (dy_rows, rows, gate_rows, weight.contiguous(), rstd, dx, dgate, partials),
        (num_rows, width, dy_rows.stride(0), rows.stride(0), gate_rows.stride(0)),
        (block_rows, block_width),
        num_warps,
    )
    return dx, dgate, add_partials(partials, weight.dtype)


@triton.jit
def _scaled(x_hat, weight, x_ptr, weight_ptr):
    """weight * x_hat, rounded where torch's product of the two dtypes would be."""
    scaled = x_hat * weight[None, :]
    if x_ptr.dtype.element_ty == weight_ptr.dtype.element_ty:
        scaled = scaled.to(x_ptr.dtype.element_ty).to(tl.float32)
    return scaled


@triton.jit
def _forward_kernel(
    x_ptr,
    gate_ptr,
    weight_ptr,
    y_ptr,
    rstd_ptr,
    num_rows,
    width,
    x_stride,
    gate_stride,
    eps,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = tl.arange(0, BLOCK_WIDTH)
    inside = (row < num_rows)[:, None] & (col < width)[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=inside, other=0.0)
    gate = tl.load(gate_ptr + row[:, None] * gate_stride + col[None, :], mask=inside, other=0.0)
    weight = tl.load(weight_ptr + col, mask=col < width, other=0.0).to(tl.float32)
    x = x.to(tl.float32)
    gate = gate.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / width + eps)
    tl.store(rstd_ptr + row, rstd, mask=row < num_rows)
    x_hat = (x * rstd[:, None]).to(x_ptr.dtype.element_ty).to(tl.float32)
    y = _scaled(x_hat, weight, x_ptr, weight_ptr) * (gate * tl.sigmoid(gate))
    tl.store(y_ptr + row[:, None] * width + col[None, :], y, mask=inside)


@triton.jit
def _backward_kernel(
    dy_ptr,
    x_ptr,
    gate_ptr,
    weight_ptr,
    rstd_ptr,
    dx_ptr,
    dgate_ptr,
    partials_ptr,
    num_rows,
    width,
    dy_stride,
    x_stride,
    gate_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    # Program p takes tiles p, p + P, p + 2P, ... and keeps its share of dweight in registers.
    col = tl.arange(0, BLOCK_WIDTH)
    weight = tl.load(weight_ptr + col, mask=col < width, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=tl.float32)
    num_tiles = tl.cdiv(num_rows, BLOCK_ROWS)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        row = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        inside = (row < num_rows)[:, None] & (col < width)[None, :]
        out = row[:, None] * width + col[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=inside, other=0.0)
        dy = tl.load(dy_ptr + row[:, None] * dy_stride + col[None, :], mask=inside, other=0.0)
        offsets = row[:, None] * gate_stride + col[None, :]
        gate = tl.load(gate_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < num_rows, other=0.0)
        dy = dy.to(tl.float32)
        x_hat = x.to(tl.float32) * rstd[:, None]
        rounded = x_hat.to(x_ptr.dtype.element_ty).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        dsilu = dy * _scaled(rounded, weight, x_ptr, weight_ptr)
        tl.store(dgate_ptr + out, dsilu * (sigmoid + silu * (1.0 - sigmoid)), mask=inside)
        dscaled = dy * silu
        dweight += dscaled * rounded
        dx_hat = dscaled * weight[None, :]
        mean = tl.sum(dx_hat * x_hat, axis=1) / width
        tl.store(dx_ptr + out, (dx_hat - x_hat * mean[:, None]) * rstd[:, None], mask=inside)
    partials = tl.program_id(0).to(tl.int64) * width + col
    tl.store(partials_ptr + partials, tl.sum(dweight, axis=0), mask=col < width)
