# mypy: allow-untyped-defs
# (the arguments of a kernel are typed by Triton)
"""RMSNorm and add + RMSNorm on Triton; the ops are in ../rms_norm.py and ../add_rms_norm.py."""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .partials import add_partials
from .rows import as_rows

# Elements of x that one program of the forward holds: narrow rows (the q and k norms, H = 128)
# share a program. On an H100 every size from 1,024 to 8,192 reaches 2.8 TB/s.
_TILE = 4096


def forward(
    x: Tensor, weight: Tensor, eps: float, zero_centered: bool = False
) -> tuple[Tensor, Tensor]:
    """x (..., H), weight (H,) -> y (..., H), rstd (rows,) float32."""
    rows = as_rows(x)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    rstd = torch.empty(x.shape[:-1].numel(), dtype=torch.float32, device=x.device)
    _forward((rows, rows, weight, y, y, rstd), eps, zero_centered, adds=False)
    return y, rstd


def add_forward(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, zero_centered: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """x, residual (..., H) -> y, x + residual (..., H), rstd (rows,) float32."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    summed = torch.empty_like(x, memory_format=torch.contiguous_format)
    rstd = torch.empty(x.shape[:-1].numel(), dtype=torch.float32, device=x.device)
    tensors = (as_rows(x), as_rows(residual), weight, y, summed, rstd)
    _forward(tensors, eps, zero_centered, adds=True)
    return y, summed, rstd


def _forward(tensors: tuple[Tensor, ...], eps: float, zero_centered: bool, adds: bool) -> None:
    rows, residual, weight, y, summed, rstd = tensors
    num_rows, width = rows.shape
    if not rows.numel():
        return
    block_rows, block_width, num_warps = tile_of(width, _TILE)
    launch(
        _forward_kernel,
        (-(-num_rows // block_rows), 1, 1),
        (rows, residual, weight.contiguous(), y, summed, rstd),
        (num_rows, width, rows.stride(0), residual.stride(0), float(eps)),
        (adds, zero_centered, block_rows, block_width),
        num_warps,
    )


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    zero_centered: bool = False,
    dsummed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """-> dx (..., H) in x's dtype, dweight (H,) in weight's; the same bits each time.

    `dsummed` (..., H) is the gradient that reaches x beside the norm; it is added to dx.
    """
    rows, dy_rows = as_rows(x), as_rows(dy)
    dsummed_rows = dy_rows if dsummed is None else as_rows(dsummed)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not rows.numel():
        return dx, torch.zeros_like(weight)
    num_rows, width = rows.shape
    block_rows, block_width, num_warps, per_sm = _backward_tile(width)
    num_programs = min(-(-num_rows // block_rows), max_programs(x.device, per_sm))
    partials = torch.empty(num_programs, width, dtype=torch.float32, device=x.device)
    launch(
        _backward_kernel,
        (num_programs, 1, 1),
        (dy_rows, dsummed_rows, rows, weight.contiguous(), rstd, dx, partials),
        (num_rows, width, dy_rows.stride(0), dsummed_rows.stride(0), rows.stride(0)),
        (dsummed is not None, zero_centered, block_rows, block_width),
        num_warps,
    )
    return dx, add_partials(partials, weight.dtype)


@cache
def tile_of(width: int, size: int) -> tuple[int, int, int]:
    """-> rows per program of `size` elements, their width as a power of 2, warps."""
    block_width = triton.next_power_of_2(width)
    num_warps = min(32, max(4, block_width * 4 // size))
    return max(1, size // block_width), block_width, num_warps


@cache
def _backward_tile(width: int) -> tuple[int, int, int, int]:
    """-> rows per program, their width as a power of 2, warps, programs per SM.

    Enough elements in flight to hide the latency of memory, few enough partial weight gradients to
    add up. On an H100, 33.5 M elements: 73 us at width 128, 72 at 2,048, and 144 at 4,096 for twice
    as many, 2.8 TB/s each; other pairs of tile and programs were up to 40 % slower.
    """
    block_width = triton.next_power_of_2(width)
    if width <= 1024:
        return 2048 // block_width, block_width, 2, 8
    if width <= 2048:
        return 2, block_width, 4, 3
    if width <= 4096:
        return 2, block_width, 4, 2
    return 1, block_width, min(32, block_width // 1024), 2


@cache
def max_programs(device: torch.device, per_sm: int) -> int:
    if device.type != "cuda":
        return 2  # interpreted: two, so that there are partial sums to add
    return per_sm * torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    summed_ptr,
    rstd_ptr,
    num_rows,
    width,
    x_stride,
    residual_stride,
    eps,
    ADDS: tl.constexpr,
    ZERO_CENTERED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = tl.arange(0, BLOCK_WIDTH)
    inside = (row < num_rows)[:, None] & (col < width)[None, :]
    out = row[:, None] * width + col[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=inside, other=0.0)
    x = x.to(tl.float32)
    if ADDS:
        offsets = row[:, None] * residual_stride + col[None, :]
        x += tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        x = x.to(summed_ptr.dtype.element_ty)
        tl.store(summed_ptr + out, x, mask=inside)
        x = x.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / width + eps)
    tl.store(rstd_ptr + row, rstd, mask=row < num_rows)
    weight = tl.load(weight_ptr + col, mask=col < width, other=0.0).to(tl.float32)
    x_hat = x * rstd[:, None]
    if ZERO_CENTERED:
        weight += 1.0
    else:
        x_hat = x_hat.to(y_ptr.dtype.element_ty).to(tl.float32)
    tl.store(y_ptr + out, x_hat * weight[None, :], mask=inside)


@triton.jit
def _backward_kernel(
    dy_ptr,
    dsummed_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    dx_ptr,
    partials_ptr,
    num_rows,
    width,
    dy_stride,
    dsummed_stride,
    x_stride,
    ADDS: tl.constexpr,
    ZERO_CENTERED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    # Program p takes tiles p, p + P, p + 2P, ... and keeps its share of dweight in registers.
    col = tl.arange(0, BLOCK_WIDTH)
    weight = tl.load(weight_ptr + col, mask=col < width, other=0.0).to(tl.float32)
    if ZERO_CENTERED:
        weight += 1.0
    dweight = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=tl.float32)
    num_tiles = tl.cdiv(num_rows, BLOCK_ROWS)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        row = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        inside = (row < num_rows)[:, None] & (col < width)[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=inside, other=0.0)
        dy = tl.load(dy_ptr + row[:, None] * dy_stride + col[None, :], mask=inside, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < num_rows, other=0.0)
        x_hat = x.to(tl.float32) * rstd[:, None]
        dy = dy.to(tl.float32)
        if ZERO_CENTERED:
            dweight += dy * x_hat
        else:
            dweight += dy * x_hat.to(dx_ptr.dtype.element_ty).to(tl.float32)
        dx_hat = dy * weight[None, :]
        mean = tl.sum(dx_hat * x_hat, axis=1) / width
        dx = (dx_hat - x_hat * mean[:, None]) * rstd[:, None]
        if ADDS:
            offsets = row[:, None] * dsummed_stride + col[None, :]
            dx += tl.load(dsummed_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row[:, None] * width + col[None, :], dx, mask=inside)
    partials = tl.program_id(0).to(tl.int64) * width + col
    tl.store(partials_ptr + partials, tl.sum(dweight, axis=0), mask=col < width)
