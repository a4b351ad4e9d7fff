# mypy: allow-untyped-defs
# (the arguments of a kernel are typed by Triton)
"""The symmetric product on Triton; the iteration and the op are in ../newton_schulz.py.

Only what lies on and below the diagonal is computed and stored a second time, transposed, above
it. (Dion and modded-nanogpt compute X X^T this way.)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# (rows and columns of a tile, depth of a slice, warps, stages), fixed: tuning would cost minutes
# of a run. Measured on an H100 with float16 (4, 2048, 2048) and (4, 2048, 6144), (1, 2048, 2048).
_SQUARE = (128, 128, 64, 4, 3)
_DEEP = (128, 128, 64, 8, 4)  # for more columns than rows
_FEW = (128, 64, 64, 4, 3)  # where larger tiles would leave processors idle
_FEW_TILES = 264  # two rounds over the processors of an H100


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
    rows = triton.cdiv(size, 128)
    few = batch * rows * (rows + 1) // 2 < _FEW_TILES
    tile_rows, tile_cols, slice_depth, num_warps, num_stages = (
        _FEW if few else _DEEP if depth > size else _SQUARE
    )
    num_tiles = sum(
        triton.cdiv((row + 1) * tile_rows, tile_cols) for row in range(triton.cdiv(size, tile_rows))
    )
    _kernel[(num_tiles, batch)](
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
        ROWS=tile_rows,
        COLS=tile_cols,
        DEPTH=slice_depth,
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
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    # The tiles that hold any of the lower half, row by row, the longest row first: no program
    # finds that it has nothing to do, and neighbours share their rows of x in the L2 cache.
    tile_row = tl.cdiv(size, ROWS) - 1
    tile_col = tl.program_id(0)
    in_row = tl.cdiv((tile_row + 1) * ROWS, COLS)
    while tile_col >= in_row:
        tile_col -= in_row
        tile_row -= 1
        in_row = tl.cdiv((tile_row + 1) * ROWS, COLS)
    entry = tl.program_id(1).to(tl.int64)
    x_ptr += entry * size * depth
    y_ptr += entry * size * depth
    plus_ptr += entry * size * size
    out_ptr += entry * size * size

    row = tile_row * ROWS + tl.arange(0, ROWS)
    col = tile_col * COLS + tl.arange(0, COLS)
    k = tl.arange(0, DEPTH)
    # Rows past the edge wrap to others, whose results are not stored: no mask in the loop.
    x_at = x_ptr + (row % size).to(tl.int64)[:, None] * depth + k[None, :]
    y_at = y_ptr + (col % size).to(tl.int64)[:, None] * depth + k[None, :]
    total = tl.zeros((ROWS, COLS), dtype=tl.float32)
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
    if (tile_col + 1) * COLS <= tile_row * ROWS:
        inside = (row < size)[:, None] & (col < size)[None, :]
        above = (col < size)[:, None] & (row < size)[None, :]
        _store(out_ptr, plus_ptr, total, row, col, size, beta, inside, above, HAS_PLUS)
    else:
        # On the diagonal only the lower half counts: each element is written once. Such a mask
        # keeps stores from being joined, so the other tiles, which are most, do without it.
        inside = (row < size)[:, None] & (row[:, None] >= col[None, :])
        above = (row < size)[None, :] & (row[None, :] > col[:, None])
        _store(out_ptr, plus_ptr, total, row, col, size, beta, inside, above, HAS_PLUS)


@triton.jit
def _store(out_ptr, plus_ptr, total, row, col, size, beta, inside, above, HAS_PLUS: tl.constexpr):
    """total + beta plus, where the tile lies and, transposed, on the other side."""
    at = row.to(tl.int64)[:, None] * size + col[None, :]
    if HAS_PLUS:
        total += beta * tl.load(plus_ptr + at, mask=inside, other=0.0).to(tl.float32)
    result = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, result, mask=inside)
    mirrored = col.to(tl.int64)[:, None] * size + row[None, :]
    tl.store(out_ptr + mirrored, tl.trans(result), mask=above)
