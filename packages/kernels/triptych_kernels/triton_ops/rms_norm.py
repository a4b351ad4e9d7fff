# mypy: allow-untyped-defs
# (the arguments of a kernel are typed by Triton)
"""RMSNorm on Triton; the formula and the op are in ../rms_norm.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import as_rows

# Elements of x that one program holds at a time: narrow rows (the q and k norms, H = 128) share
# a program.
_TILE = 4096
# Programs per SM of the backward: enough rows in flight to hide the latency of memory, few enough
# partial weight gradients to add up.
_PROGRAMS_PER_SM = 4


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x (..., H), weight (H,) -> y (..., H), rstd (rows,) float32."""
    rows = as_rows(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(x.shape[:-1].numel(), dtype=torch.float32, device=x.device)
    if rows.numel():
        block_rows, block_width, num_warps = _tile(rows.shape[1])
        _forward_kernel[(triton.cdiv(rows.shape[0], block_rows),)](
            rows,
            weight.contiguous(),
            y,
            rstd,
            rows.shape[0],
            rows.shape[1],
            rows.stride(0),
            eps,
            BLOCK_ROWS=block_rows,
            BLOCK_WIDTH=block_width,
            num_warps=num_warps,
        )
    return y, rstd


def backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """-> dx (..., H) in x's dtype, dweight (H,) in weight's; the same bits each time."""
    rows, dy_rows = as_rows(x), as_rows(dy)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not rows.numel():
        return dx, torch.zeros_like(weight)
    num_rows, width = rows.shape
    block_rows, block_width, num_warps = _tile(width)
    num_programs = min(triton.cdiv(num_rows, block_rows), _max_programs(x))
    partials = torch.empty(num_programs, width, dtype=torch.float32, device=x.device)
    _backward_kernel[(num_programs,)](
        dy_rows,
        rows,
        weight.contiguous(),
        rstd,
        dx,
        partials,
        num_rows,
        width,
        dy_rows.stride(0),
        rows.stride(0),
        BLOCK_ROWS=block_rows,
        BLOCK_WIDTH=block_width,
        num_warps=num_warps,
    )
    return dx, partials.sum(0).to(weight.dtype)


def _tile(width: int) -> tuple[int, int, int]:
    """-> rows per program, their width rounded up to a power of 2, warps."""
    block_width = triton.next_power_of_2(width)
    num_warps = min(32, max(4, block_width // 1024))
    return max(1, _TILE // block_width), block_width, num_warps


def _max_programs(x: Tensor) -> int:
    if x.device.type != "cuda":
        return 2  # interpreted: two, so that there are partial sums to add
    return _PROGRAMS_PER_SM * torch.cuda.get_device_properties(x.device).multi_processor_count


@triton.jit
def _forward_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    rstd_ptr,
    num_rows,
    width,
    x_stride,
    eps,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = tl.arange(0, BLOCK_WIDTH)
    inside = (row < num_rows)[:, None] & (col < width)[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=inside, other=0.0)
    x = x.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / width + eps)
    tl.store(rstd_ptr + row, rstd, mask=row < num_rows)
    weight = tl.load(weight_ptr + col, mask=col < width, other=0.0).to(tl.float32)
    x_hat = (x * rstd[:, None]).to(y_ptr.dtype.element_ty).to(tl.float32)
    y = x_hat * weight[None, :]
    tl.store(y_ptr + row[:, None] * width + col[None, :], y, mask=inside)


@triton.jit
def _backward_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    dx_ptr,
    partials_ptr,
    num_rows,
    width,
    dy_stride,
    x_stride,
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
        x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=inside, other=0.0)
        dy = tl.load(dy_ptr + row[:, None] * dy_stride + col[None, :], mask=inside, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < num_rows, other=0.0)
        x_hat = x.to(tl.float32) * rstd[:, None]
        dy = dy.to(tl.float32)
        dweight += dy * x_hat.to(dx_ptr.dtype.element_ty).to(tl.float32)
        dx_hat = dy * weight[None, :]
        mean = tl.sum(dx_hat * x_hat, axis=1) / width
        dx = (dx_hat - x_hat * mean[:, None]) * rstd[:, None]
        tl.store(dx_ptr + row[:, None] * width + col[None, :], dx, mask=inside)
    partials = tl.program_id(0).to(tl.int64) * width + col
    tl.store(partials_ptr + partials, tl.sum(dweight, axis=0), mask=col < width)
