# mypy: allow-untyped-defs
# (the arguments of a kernel are typed by Triton)
"""Adding up what the programs of a backward each gathered for a weight's gradient."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch

_COLUMNS = 32  # of a program: narrow, so that many processors share the little work there is
_ROWS = 128  # partial sums that a program has in flight


def add_partials(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """partials (P, H) float32 -> their sum (H,) in `dtype`, rounded once, the same bits each time.

    One launch; `partials.sum(0).to(dtype)` is two, which took 10 us on an H100 where the backward
    of an RMSNorm of 16,384 x 2,048 elements takes 75.
    """
    num_partials, width = partials.shape
    out = torch.empty(width, dtype=dtype, device=partials.device)
    launch(
        _add_kernel,
        (-(-width // _COLUMNS), 1, 1),
        (partials, out),
        (num_partials, width),
        (_ROWS, _COLUMNS),
    )
    return out


@triton.jit
def _add_kernel(partials_ptr, out_ptr, num_partials, width, ROWS: tl.constexpr, COLS: tl.constexpr):
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    total = tl.zeros((ROWS, COLS), dtype=tl.float32)
    for start in range(0, num_partials, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < num_partials)[:, None] & (col < width)[None, :]
        at = row.to(tl.int64)[:, None] * width + col[None, :]
        total += tl.load(partials_ptr + at, mask=inside, other=0.0)
    tl.store(out_ptr + col, tl.sum(total, axis=0), mask=col < width)
