# mypy: allow-untyped-defs
# (the arguments of a kernel are typed by Triton)
"""Weighted sum on Triton; the formula and the op are in ../weighted_sum.py."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048  # with 8 warps each thread moves 8 elements: 16 bytes of bfloat16 per load


def weighted_sum(flat: Sequence[Tensor], weights: Sequence[float], total: Tensor) -> None:
    """total (n,) = sum of weights[i] * flat[i] (n,), all contiguous and of one device."""
    if not total.numel():
        return
    addresses = _on_device([x.data_ptr() for x in flat], torch.int64, total.device)
    factors = _on_device(weights, torch.float64, total.device)
    _kernel[(triton.cdiv(total.numel(), _BLOCK),)](
        flat[0],  # gives the kernel the dtype that the addresses point to
        addresses,
        factors,
        total,
        total.numel(),
        len(flat),
        ALIGNED=all(x.data_ptr() % 16 == 0 for x in flat),
        WIDE=total.dtype == torch.float32,
        BLOCK=_BLOCK,
        num_warps=8,
    )


def _on_device(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The values as a tensor; the copy from page-locked memory does not wait for the device."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype).pin_memory().to(device, non_blocking=True)


@triton.jit
def _kernel(
    like_ptr,
    addresses_ptr,
    factors_ptr,
    total_ptr,
    size,
    num_tensors,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    # The first term starts the sum: 0 + x would turn -0.0 into 0.0.
    total = _term(like_ptr, addresses_ptr, factors_ptr, 0, at, inside, ALIGNED, WIDE)
    for index in range(1, num_tensors):
        total += _term(like_ptr, addresses_ptr, factors_ptr, index, at, inside, ALIGNED, WIDE)
    tl.store(total_ptr + at, total.to(total_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _term(
    like_ptr,
    addresses_ptr,
    factors_ptr,
    index,
    at,
    inside,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Tensor number `index` at the places `at` times its factor, in the accumulator's dtype."""
    x_ptr = tl.load(addresses_ptr + index).to(like_ptr.dtype)
    if ALIGNED:  # a loaded address carries no alignment of its own, and without it loads are narrow
        x_ptr = tl.multiple_of(x_ptr, 16)
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    factor = tl.load(factors_ptr + index)
    return x.to(tl.float64) * factor if WIDE else x.to(tl.float32) * factor.to(tl.float32)
