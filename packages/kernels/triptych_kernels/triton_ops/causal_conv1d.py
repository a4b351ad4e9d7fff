# mypy: allow-untyped-defs, disable-error-code="assignment"
# (the arguments of a kernel are typed by Triton, and its tuples grow)
"""Short causal convolution on Triton; the formula and the op are in ../causal_conv1d.py."""

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .partials import add_partials
from .rms_norm import max_programs
from .rows import as_rows

_COLUMNS = 256  # of a program: in the backward 8 of a thread, 16 bytes of bfloat16
_ROWS = 16  # of a program of the forward
_STRIDE = 4  # rows whose loads a program of the backward has in flight
_PROGRAMS_PER_SM = 10  # of the backward, a warp each: as many as there are registers for


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor,
    silu: bool,
    widths: Sequence[int],
) -> list[Tensor]:
    """x (T, D), weight (D, W), bias (D,), position (T,) -> y, cut into (T, width) each."""
    x, weight = as_rows(x), weight.contiguous()
    num_rows, parts = x.shape[0], []
    for some in _slices(widths):
        width = some.stop - some.start
        parts.append(torch.empty(num_rows, width, dtype=x.dtype, device=x.device))
        if num_rows:
            launch(
                _forward_kernel,
                (-(-num_rows // _ROWS), -(-width // _COLUMNS), 1),
                (x[:, some], weight[some], _part(bias, some, weight), position, parts[-1]),
                (num_rows, width, x.stride(0)),
                (weight.shape[1], silu, bias is not None, _ROWS, _COLUMNS),
            )
    return parts


def backward(
    dys: Sequence[Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """-> dx (T, D), dweight (D, W), dbias (D,), each in its input's dtype; the same bits each time.

    dys: the gradients of the parts of y, (T, width) each.
    """
    x, weight_rows, taps = as_rows(x), weight.contiguous(), weight.shape[1]
    num_rows, total = x.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    widths = [dy.shape[1] for dy in dys]
    rows, num_programs = _rows_of(num_rows, -(-max(widths) // _COLUMNS), taps, x.device)
    # Of a program one row a tap, and one for the bias.
    partials = torch.empty(num_programs, taps + 1, total, dtype=torch.float32, device=x.device)
    for dy, width, some in zip(dys, widths, _slices(widths), strict=True):
        dy = as_rows(dy)
        given = (dy, x[:, some], weight_rows[some], _part(bias, some, weight_rows), position)
        if num_rows:
            launch(
                _backward_kernel,
                (num_programs, -(-width // _COLUMNS), 1),
                (*given, dx[:, some], partials[..., some]),
                (num_rows, width, rows, dy.stride(0), x.stride(0), total),
                (taps, silu, bias is not None, _STRIDE, _COLUMNS),
                num_warps=1,
            )
    sums = add_partials(partials.flatten(1), torch.float32).view(taps + 1, total)
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    dweight.copy_(sums[:taps].T)
    return dx, dweight, None if bias is None else sums[taps].to(bias.dtype, copy=True)


def _slices(widths: Sequence[int]) -> list[slice]:
    ends = list(accumulate(widths))
    return [slice(end - width, end) for end, width in zip(ends, widths, strict=True)]


def _part(bias: Tensor | None, some: slice, weight: Tensor) -> Tensor:
    """Any tensor stands where there is no bias: the kernel does not read it."""
    return weight if bias is None else bias.contiguous()[some]


def _rows_of(num_rows: int, blocks: int, taps: int, device: torch.device) -> tuple[int, int]:
    """-> rows of a program, and programs, for so many blocks of columns beside each other.

    A program also goes over the taps - 1 rows after its own: with those its rows are a multiple of
    _STRIDE.
    """
    share = -(-num_rows * blocks // max_programs(device, _PROGRAMS_PER_SM))
    rows = -(-(share + taps - 1) // _STRIDE) * _STRIDE
    rows = max(rows - (taps - 1), 1)
    return rows, -(-num_rows // rows)


@triton.jit
def _forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    position_ptr,
    y_ptr,
    num_rows,
    width,
    x_stride,
    TAPS: tl.constexpr,
    SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < num_rows)[:, None] & (col < width)[None, :]
    position = tl.load(position_ptr + row, mask=row < num_rows, other=0)
    y = tl.zeros((ROWS, COLUMNS), tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + col, mask=col < width, other=0.0).to(tl.float32)[None, :]
    for back in tl.static_range(TAPS):  # the later of them from the cache
        weight = tl.load(weight_ptr + col * TAPS + (TAPS - 1 - back), mask=col < width, other=0.0)
        seen = inside & (position >= back)[:, None]
        at = (row - back)[:, None] * x_stride + col[None, :]
        x = tl.load(x_ptr + at, mask=seen, other=0.0).to(tl.float32)
        y += weight.to(tl.float32)[None, :] * x
    if SILU:
        y = y * tl.sigmoid(y)
    tl.store(y_ptr + row[:, None] * width + col[None, :], y, mask=inside)


@triton.jit
def _slope_of_silu(bias, weights, seen, TAPS: tl.constexpr):
    z = bias
    for back in tl.static_range(TAPS):
        z += weights[back] * seen[back]
    sigmoid = tl.sigmoid(z)
    return sigmoid * (1.0 + z * (1.0 - sigmoid))


@triton.jit
def _backward_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    position_ptr,
    dx_ptr,
    partials_ptr,
    num_rows,
    width,
    rows,
    dy_stride,
    x_stride,
    total,
    TAPS: tl.constexpr,
    SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STRIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # A program goes down its rows and the TAPS - 1 after them, and holds in registers what the next
    # row needs of those before it: so it reads x and dy once. Tuples are by distance in rows.
    col = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = col < width
    start = tl.program_id(0).to(tl.int64) * rows
    end = tl.minimum(start + rows, num_rows)
    zero = tl.zeros((COLUMNS,), tl.float32)
    near = tl.load(position_ptr + start)
    weights, before, pending, dweights, bias, dbias = (), (), (), (), zero, zero
    for back in tl.static_range(TAPS):
        weight = tl.load(weight_ptr + col * TAPS + (TAPS - 1 - back), mask=inside, other=0.0)
        weights += (weight.to(tl.float32),)
        dweights += (zero,)
        if back > 0:
            x = tl.load(
                x_ptr + (start - back) * x_stride + col, mask=inside & (near >= back), other=0.0
            )
            before += (x.to(tl.float32),)
            pending += (zero,)  # what dx of the rows before has gathered so far
    if HAS_BIAS:
        bias = tl.load(bias_ptr + col, mask=inside, other=0.0).to(tl.float32)
    for first in range(start, end + TAPS - 1, STRIDE):
        xs, dys, nears = (), (), ()
        for i in tl.static_range(STRIDE):
            t = first + i
            there = inside & (t < num_rows)
            xs += (tl.load(x_ptr + t * x_stride + col, mask=there, other=0.0),)
            dys += (tl.load(dy_ptr + t * dy_stride + col, mask=there, other=0.0),)
            nears += (tl.load(position_ptr + t, mask=t < num_rows, other=0),)
        for i in tl.static_range(STRIDE):
            t = first + i
            near = nears[i]
            seen = (xs[i].to(tl.float32),)
            for back in tl.static_range(1, TAPS):
                seen += (tl.where(near >= back, before[back - 1], 0.0),)
            dz = dys[i].to(tl.float32)
            if SILU:
                dz *= _slope_of_silu(bias, weights, seen, TAPS)
            own = tl.where(t < end, dz, 0.0)
            dbias += own
            sums, gathered = (), (weights[0] * dz,)
            for back in tl.static_range(TAPS):
                sums += (dweights[back] + own * seen[back],)
                if back > 0:
                    reached = tl.where(near >= back, dz, 0.0)
                    gathered += (pending[back - 1] + weights[back] * reached,)
            dweights, before, pending = sums, seen[: TAPS - 1], gathered[: TAPS - 1]
            done = t - (TAPS - 1)
            tl.store(
                dx_ptr + done * total + col,
                gathered[TAPS - 1],
                mask=inside & (done >= start) & (done < end),
            )
    partials_ptr += tl.program_id(0).to(tl.int64) * (TAPS + 1) * total + col
    for back in tl.static_range(TAPS):
        tl.store(partials_ptr + (TAPS - 1 - back) * total, dweights[back], mask=inside)
    tl.store(partials_ptr + TAPS * total, dbias, mask=inside)
