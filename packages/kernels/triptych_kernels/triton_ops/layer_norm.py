# mypy: allow-untyped-defs
# (the arguments of a kernel are typed by Triton)
"""LayerNorm on Triton; the formula and the op are in ../layer_norm.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .rms_norm import max_programs, tile_of
from .rows import as_rows

_TILE = 2048  # half of rms_norm's: two partial gradients are held beside x
_PROGRAMS_PER_SM = 4


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x (..., H), weight and bias (H,) -> y (..., H), mean and rstd (rows,) float32."""
    rows = as_rows(x)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    mean = torch.empty(x.shape[:-1].numel(), dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if rows.numel():
        num_rows, width = rows.shape
        block_rows, block_width, num_warps = tile_of(width, _TILE)
        launch(
            _forward_kernel,
            (-(-num_rows // block_rows), 1, 1),
            (rows, _or(weight, rows), _or(bias, rows), y, mean, rstd),
            (num_rows, width, rows.stride(0), float(eps)),
            (weight is not None, bias is not None, block_rows, block_width),
            num_warps,
        )
    return y, mean, rstd


def backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dx (..., H), dweight and dbias (H,) float32; the same bits each time.

    Without weight or bias its gradient is (0,).
    """
    rows, dy_rows = as_rows(x), as_rows(dy)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    has_weight = weight is not None
    num_rows, width = rows.shape
    if not rows.numel():
        dweight = torch.zeros(x.shape[-1] * has_weight, dtype=torch.float32, device=x.device)
        return dx, dweight, dweight.new_zeros(x.shape[-1] * has_bias)
    block_rows, block_width, num_warps = tile_of(width, _TILE)
    num_programs = min(-(-num_rows // block_rows), max_programs(x.device, _PROGRAMS_PER_SM))
    partials = torch.empty(
        num_programs, has_weight + has_bias, width, dtype=torch.float32, device=x.device
    )
    launch(
        _backward_kernel,
        (num_programs, 1, 1),
        (dy_rows, rows, _or(weight, rows), mean, rstd, dx, partials),
        (num_rows, width, dy_rows.stride(0), rows.stride(0)),
        (has_weight, has_bias, block_rows, block_width),
        num_warps,
    )
    sums = partials.sum(0)
    return dx, sums[:has_weight].flatten(), sums[has_weight:].flatten()


def _or(parameter: Tensor | None, placeholder: Tensor) -> Tensor:
    return placeholder if parameter is None else parameter.contiguous()


@triton.jit
def _forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    num_rows,
    width,
    x_stride,
    eps,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = tl.arange(0, BLOCK_WIDTH)
    inside = (row < num_rows)[:, None] & (col < width)[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=inside, other=0.0)
    x = x.to(tl.float32)
    mean = tl.sum(x, axis=1) / width
    centred = tl.where(inside, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / width + eps)
    tl.store(mean_ptr + row, mean, mask=row < num_rows)
    tl.store(rstd_ptr + row, rstd, mask=row < num_rows)
    y = centred * rstd[:, None]
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + col, mask=col < width, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + col, mask=col < width, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + row[:, None] * width + col[None, :], y, mask=inside)


@triton.jit
def _backward_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    partials_ptr,
    num_rows,
    width,
    dy_stride,
    x_stride,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    # Program p takes tiles p, p + P, ... and keeps its share of dweight and dbias in registers.
    col = tl.arange(0, BLOCK_WIDTH)
    dweight = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=tl.float32)
    dbias = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=tl.float32)
    num_tiles = tl.cdiv(num_rows, BLOCK_ROWS)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        row = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        inside = (row < num_rows)[:, None] & (col < width)[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=inside, other=0.0)
        dy = tl.load(dy_ptr + row[:, None] * dy_stride + col[None, :], mask=inside, other=0.0)
        mean = tl.load(mean_ptr + row, mask=row < num_rows, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < num_rows, other=0.0)
        dy = dy.to(tl.float32)
        x_hat = tl.where(inside, (x.to(tl.float32) - mean[:, None]) * rstd[:, None], 0.0)
        if HAS_BIAS:
            dbias += dy
        dx_hat = dy
        if HAS_WEIGHT:
            dweight += dy * x_hat
            weight = tl.load(weight_ptr + col, mask=col < width, other=0.0).to(tl.float32)
            dx_hat = dy * weight[None, :]
        along = tl.sum(dx_hat * x_hat, axis=1) / width
        shift = tl.sum(dx_hat, axis=1) / width
        dx = (dx_hat - x_hat * along[:, None] - shift[:, None]) * rstd[:, None]
        tl.store(dx_ptr + row[:, None] * width + col[None, :], dx, mask=inside)
    num_parameters: tl.constexpr = HAS_WEIGHT + HAS_BIAS
    partials = partials_ptr + tl.program_id(0).to(tl.int64) * num_parameters * width + col
    if HAS_WEIGHT:
        tl.store(partials, tl.sum(dweight, axis=0), mask=col < width)
    if HAS_BIAS:
        tl.store(partials + HAS_WEIGHT * width, tl.sum(dbias, axis=0), mask=col < width)
