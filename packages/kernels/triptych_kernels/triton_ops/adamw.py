# mypy: allow-untyped-defs
# (the arguments of a kernel are typed by Triton)
"""AdamW on Triton, many tensors a launch; the formula and the op are in ../adamw.py."""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a program: 4 a thread, 16 bytes of float32 per load. With 8 a thread, bfloat16's loads
# too would be as wide, but the kernel needs 146 registers and not 48 (Triton 3.8, sm_90).
_BLOCK, _WARPS = 1024, 8
_COLUMNS = tl.constexpr(6)  # of a tensor's row: five addresses and its number of elements

Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]  # param, grad, states, copy


class Constants(NamedTuple):
    """What the kernel multiplies with, from the step's options; see `constants_of`."""

    keep: float  # of the parameter: 1 - lr * weight_decay
    step_size: float
    fresh1: float  # 1 - beta1
    beta2: float
    fresh2: float  # 1 - beta2
    root: float  # sqrt(1 - beta2^step)
    eps: float


def adamw(
    rows: Sequence[Tensors], constants: Constants, grad_scale: Tensor | None, seed: int
) -> None:
    """Update contiguous tensors in place: one launch for all that are alike.

    Alike are the dtype of gradients and of states, and whether all five addresses are multiples of
    16 bytes; in training all are, so that there is one launch.
    """
    alike: dict[tuple[bool, bool, bool], list[tuple[int, ...]]] = {}
    for row in rows:
        param, grad, exp_avg, exp_avg_sq, copy = row
        at = (
            param.data_ptr(),
            grad.data_ptr(),
            exp_avg.data_ptr(),
            exp_avg_sq.data_ptr(),
            0 if copy is None else copy.data_ptr(),
        )
        aligned = (at[0] | at[1] | at[2] | at[3] | at[4]) & 15 == 0
        kind = (grad.dtype == torch.bfloat16, exp_avg.dtype == torch.bfloat16, aligned)
        if param.numel():
            alike.setdefault(kind, []).append((*at, param.numel()))
    device = rows[0][0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for number, (kind, table) in enumerate(alike.items()):
            _launch(tuple(table), kind, constants, grad_scale, seed + number, device)


def _launch(table, kind, constants, grad_scale, seed, device):
    half_grads, half_states, aligned = kind
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    chunks = _chunks(tuple([row[-1] for row in table]), device, stream)
    addresses = _addresses(table, device, stream)
    _kernel[(len(chunks),)](
        addresses,
        chunks,
        addresses if grad_scale is None else grad_scale,
        *constants,
        seed & 0x7FFFFFFF,  # always an int32, so that there is one variant of the kernel
        seed >> 31 & 0x7FFFFFFF,
        HALF_GRADS=half_grads,
        HALF_STATES=half_states,
        SCALED=grad_scale is not None,
        ALIGNED=aligned,
        BLOCK=_BLOCK,
        num_warps=_WARPS,
    )


@lru_cache(maxsize=64)
def _chunks(sizes: tuple[int, ...], device: torch.device, stream: object) -> Tensor:
    """(programs, 2) int32: each program's tensor, and which of that tensor's blocks it works on.

    Kept for the stream that made it, as others would not wait for it.
    """
    blocks = torch.tensor([-(-size // _BLOCK) for size in sizes])
    tensor = torch.arange(len(sizes)).repeat_interleave(blocks)
    first = (blocks.cumsum(0) - blocks)[tensor]
    block = torch.arange(len(tensor)) - first
    return _on_device(torch.stack([tensor, block], dim=1).int(), device)


@lru_cache(maxsize=64)
def _addresses(table: tuple[tuple[int, ...], ...], device: torch.device, stream: object) -> Tensor:
    """(tensors, _COLUMNS) int64 on the device; copied anew only when an address has changed."""
    return _on_device(torch.tensor(table), device)


def _on_device(values: Tensor, device: torch.device) -> Tensor:
    """A copy from page-locked memory, which does not wait for the device."""
    if device.type != "cuda":
        return values
    return values.pin_memory().to(device, non_blocking=True)


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def _kernel(
    addresses_ptr,
    chunks_ptr,
    scale_ptr,
    keep,
    step_size,
    fresh1,
    beta2,
    fresh2,
    root,
    eps,
    seed_low,
    seed_high,
    HALF_GRADS: tl.constexpr,
    HALF_STATES: tl.constexpr,
    SCALED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64) * 2
    tensor = tl.load(chunks_ptr + chunk)
    block = tl.load(chunks_ptr + chunk + 1)
    row = addresses_ptr + tensor.to(tl.int64) * _COLUMNS
    start = block.to(tl.int64) * BLOCK
    size = tl.load(row + 5)
    scale = 1.0
    if SCALED:
        scale = tl.load(scale_ptr)
        size = tl.where(tl.abs(scale) < float("inf"), size, 0)  # also without a NaN
    noise = 0
    if HALF_STATES:
        noise = _noise(seed_low, seed_high, tensor, block, BLOCK)
    # Two forms, as a load under a mask of unknown length is a load of single elements.
    if start + BLOCK <= size:
        _update(
            row, start, size, scale, noise, keep, step_size, fresh1, beta2, fresh2, root, eps,
            HALF_GRADS, HALF_STATES, ALIGNED, False, BLOCK,
        )  # fmt: skip
    else:
        _update(
            row, start, size, scale, noise, keep, step_size, fresh1, beta2, fresh2, root, eps,
            HALF_GRADS, HALF_STATES, ALIGNED, True, BLOCK,
        )  # fmt: skip


@triton.jit
def _update(
    row,
    start,
    size,
    scale,
    noise,
    keep,
    step_size,
    fresh1,
    beta2,
    fresh2,
    root,
    eps,
    HALF_GRADS: tl.constexpr,
    HALF_STATES: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = start + tl.arange(0, BLOCK)
    inside = at < size
    param_ptr = _pointer(row, 0, False, ALIGNED)
    exp_avg_ptr = _pointer(row, 2, HALF_STATES, ALIGNED)
    exp_avg_sq_ptr = _pointer(row, 3, HALF_STATES, ALIGNED)
    copy_address = tl.load(row + 4)
    grad = _load(_pointer(row, 1, HALF_GRADS, ALIGNED) + at, inside, HALF_GRADS, MASKED) * scale
    param = _load(param_ptr + at, inside, False, MASKED)
    exp_avg = _load(exp_avg_ptr + at, inside, HALF_STATES, MASKED)
    exp_avg_sq = _load(exp_avg_sq_ptr + at, inside, HALF_STATES, MASKED)

    exp_avg += (grad - exp_avg) * fresh1
    exp_avg_sq = exp_avg_sq * beta2 + grad * grad * fresh2
    denominator = tl.div_rn(tl.sqrt_rn(exp_avg_sq), root + tl.zeros_like(param)) + eps
    param = param * keep - step_size * tl.div_rn(exp_avg, denominator)

    _store(param_ptr + at, param, inside, MASKED)
    if HALF_STATES:  # 16 of a random word's bits for each of the two
        exp_avg = _half(exp_avg, noise & 0xFFFF)
        exp_avg_sq = _half(exp_avg_sq, noise >> 16)
    _store(exp_avg_ptr + at, exp_avg, inside, MASKED)
    _store(exp_avg_sq_ptr + at, exp_avg_sq, inside, MASKED)
    if copy_address != 0:
        bits = param.to(tl.uint32, bitcast=True)
        nearest = _half(param, 0x7FFF + ((bits >> 16) & 1))
        _store(_pointer(row, 4, True, ALIGNED) + at, nearest, inside, MASKED)


@triton.jit
def _noise(seed_low, seed_high, tensor, block, BLOCK: tl.constexpr):
    """-> BLOCK random uint32, a function of seed, tensor and place alone: four a Philox call."""
    lane = tl.arange(0, BLOCK // 4).to(tl.uint32)
    seed = seed_low.to(tl.uint64) | (seed_high.to(tl.uint64) << 31)
    zero = lane * 0
    a, b, c, d = tl.philox(
        seed, lane, zero + block.to(tl.uint32), zero + tensor.to(tl.uint32), zero
    )
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def _pointer(row, column, HALF: tl.constexpr, ALIGNED: tl.constexpr):
    """An address of the table; bfloat16 as its bits, which Triton's interpreter gets right too."""
    address = tl.load(row + column)
    if HALF:
        pointer = address.to(tl.pointer_type(tl.uint16))
    else:
        pointer = address.to(tl.pointer_type(tl.float32))
    if ALIGNED:  # a loaded address carries no alignment of its own, and without it loads are narrow
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _load(pointers, inside, HALF: tl.constexpr, MASKED: tl.constexpr):
    """-> float32."""
    x = tl.load(pointers, mask=inside, other=0) if MASKED else tl.load(pointers)
    if HALF:
        x = (x.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x


@triton.jit
def _store(pointers, x, inside, MASKED: tl.constexpr):
    if MASKED:
        tl.store(pointers, x, mask=inside)
    else:
        tl.store(pointers, x)


@triton.jit
def _half(x, below):
    """float32 -> the bits of bfloat16: `below` (under 2^16) is added to what is then cut off."""
    bits = x.to(tl.uint32, bitcast=True)
    # A NaN's bits could run over into the sign.
    return tl.where(x != x, 0x7FC0, (bits + below) >> 16).to(tl.uint16)
