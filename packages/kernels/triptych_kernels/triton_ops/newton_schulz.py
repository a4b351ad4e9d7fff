# mypy: allow-untyped-defs
# (the arguments of a kernel are typed by Triton)
"""The symmetric product on Triton; the iteration and the op are in ../newton_schulz.py.

Only the tiles on and below the diagonal are computed; each is stored a second time, transposed,
above it. (Dion and modded-nanogpt compute X X^T this way.)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# (tile side, depth of a slice, warps, stages), fixed: autotuning would cost minutes of a run.
_LARGE = (128, 64, 8, 3)
_SMALL = (64, 64, 4, 4)  # where large tiles would leave processors idle
_FEW_TILES = 264  # two rounds over the processors of an H100
_GROUP = 8  # rows of tiles that share columns in the L2 cache


def symmetric_product(
    x: Tensor, y: Tensor, plus: Tensor | None, alpha: float, beta: float
) -> Tensor:
    """alpha x y^T + beta plus, where that is symmetric; x, y (B, M, K), plus and result (B, M, M).

    The inputs are contiguous. Exactly symmetric, and the same bits each time.
    """
    batch, size, depth = x.shape
    out = torch.empty(batch, size, size, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    rows = triton.cdiv(size, _LARGE[0])
    large = batch * rows * (rows + 1) // 2 >= _FEW_TILES
    side, slice_depth, num_warps, num_stages = _LARGE if large else _SMALL
    rows = triton.cdiv(size, side)
    _kernel[(rows * rows, batch)](
        x,
        y,
        out if plus is None else plus,
        out,
        size,
        depth,
        alpha,
        beta,
        HAS_PLUS=plus is not None,
        EXACT_DEPTH=depth % slice_depth == 0,
        SIDE=side,
        DEPTH=slice_depth,
        GROUP=_GROUP,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return out


@triton.jit
def _kernel(
    x_ptr,
    y_ptr,
    plus_ptr,
    out_ptr,
    size,
    depth,
    alpha,
    beta,
    HAS_PLUS: tl.constexpr,
    EXACT_DEPTH: tl.constexpr,
    SIDE: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    tiles = tl.cdiv(size, SIDE)
    # Tiles in bands of GROUP rows, column by column, as in Triton's matmul tutorial.
    band = tl.program_id(0) // (GROUP * tiles)
    rows_of_band = tl.minimum(tiles - band * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * tiles)
    tile_row = band * GROUP + within % rows_of_band
    tile_col = within // rows_of_band
    if tile_col > tile_row:
        return
    entry = tl.program_id(1).to(tl.int64)
    x_ptr += entry * size * depth
    y_ptr += entry * size * depth
    plus_ptr += entry * size * size
    out_ptr += entry * size * size

    row = tile_row * SIDE + tl.arange(0, SIDE)
    col = tile_col * SIDE + tl.arange(0, SIDE)
    k = tl.arange(0, DEPTH)
    # Rows past the edge wrap to others, whose results are not stored: no mask in the loop.
    x_at = x_ptr + (row % size).to(tl.int64)[:, None] * depth + k[None, :]
    y_at = y_ptr + (col % size).to(tl.int64)[:, None] * depth + k[None, :]
    total = tl.zeros((SIDE, SIDE), dtype=tl.float32)
    for start in range(0, depth, DEPTH):
        if EXACT_DEPTH:
            x = tl.load(x_at)
            y = tl.load(y_at)
        else:
            inside_depth = (start + k < depth)[None, :]
            x = tl.load(x_at, mask=inside_depth, other=0.0)
            y = tl.load(y_at, mask=inside_depth, other=0.0)
        total = tl.dot(x, tl.trans(y), total, input_precision="ieee")
        x_at += DEPTH
        y_at += DEPTH

    total = total * alpha
    inside = (row < size)[:, None] & (col < size)[None, :]
    at = row.to(tl.int64)[:, None] * size + col[None, :]
    if HAS_PLUS:
        total += beta * tl.load(plus_ptr + at, mask=inside, other=0.0).to(tl.float32)
    result = total.to(out_ptr.dtype.element_ty)
    if tile_row == tile_col:
        # On the diagonal both halves were computed; the lower one counts for both.
        upper = row[:, None] < col[None, :]
        result = tl.where(upper, tl.trans(result), result)
        tl.store(out_ptr + at, result, mask=inside)
    else:
        tl.store(out_ptr + at, result, mask=inside)
        mirrored = col.to(tl.int64)[:, None] * size + row[None, :]
        inside_mirrored = (col < size)[:, None] & (row < size)[None, :]
        tl.store(out_ptr + mirrored, tl.trans(result), mask=inside_mirrored)
