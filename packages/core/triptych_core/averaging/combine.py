"""The arithmetic: one stretch of a tensor from the same stretch of every input.

Every step is an elementwise operation that is rounded by itself, so that an element's value does
not depend on where stretches begin, nor on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from triptych_core.averaging.direct import Landing

BLOCK = 1 << 16  # elements that stay in a core's cache from one operation to the next

# Elements of an input's stretch by its number, in its dtype; valid until the next call.
Load = Callable[[int], Tensor]


class Room:
    """The memory of one thread, used again for every stretch.

    Args:
        elements: of a stretch, at most.
        raw_bytes: of an element of the inputs, at most.
        dtype: of accumulation.
        sums: how many accumulators the method needs.
    """

    def __init__(self, elements: int, raw_bytes: int, dtype: torch.dtype, sums: int) -> None:
        self.elements = elements
        self.landing = Landing(elements * raw_bytes)
        self._sums = [torch.empty(elements, dtype=dtype) for _ in range(sums)]
        self._scratch = torch.empty(min(BLOCK, elements), dtype=dtype)

    @staticmethod
    def bytes_of(elements: int, raw_bytes: int, dtype: torch.dtype, sums: int) -> int:
        """What such a room takes; blocks of flags and histograms come to less than 2 MiB."""
        accumulators = (elements * sums + BLOCK) * dtype.itemsize
        return Landing.bytes_of(elements * raw_bytes) + accumulators + (2 << 20)

    def sums(self, size: int, dtype: torch.dtype) -> list[Tensor]:
        """The accumulators' first `size` elements, in fp32 also if there is room for fp64."""
        return [memory.view(dtype)[:size] for memory in self._sums]

    def scratch(self, raw: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy of a block in the dtype of accumulation."""
        return self._scratch.view(dtype)[: raw.numel()].copy_(raw)


def linear(
    load: Load, weights: Sequence[float], size: int, room: Room, dtype: torch.dtype
) -> Tensor:
    """Sum of weight times input; inputs of weight zero are not read.

    Equal weights are applied to the sum: the average of the same number n times is that number.
    """
    total = room.sums(size, dtype)[0]
    counted = [(number, weight) for number, weight in enumerate(weights) if weight != 0]
    if not counted:
        return total.zero_()
    equal = len({weight for _, weight in counted}) == 1
    for place, (number, weight) in enumerate(counted):
        factor = None if equal else weight
        if place == 0:
            _scaled(load(number), factor, total)
        else:
            _add(load(number), factor, total, room)
    # Divided and not multiplied: 1 / weight is the whole number that 1 / 3 is not.
    return total.div_(1 / counted[0][1]) if equal and counted[0][1] != 1 else total


def task_arithmetic(
    load: Load, weights: Sequence[float], scale: float, size: int, room: Room, dtype: torch.dtype
) -> Tensor:
    """Base plus scale times the sum of weight times (input - base) (arXiv 2212.04089)."""
    total, base = room.sums(size, dtype)[:2]
    base.copy_(load(0))
    total.zero_()
    for number, weight in enumerate(weights, 1):
        for raw, its_base, its_total in _blocks(load(number), base, total):
            change = room.scratch(raw, dtype).sub_(its_base).mul_(weight)
            its_total.add_(change)
    return total.mul_(scale).add_(base)


def ties(
    load: Load,
    weights: Sequence[float],
    thresholds: Sequence[float],
    scale: float,
    size: int,
    room: Room,
    dtype: torch.dtype,
) -> Tensor:
    """Base plus scale times the mean of those differences that agree in sign (arXiv 2306.01708).

    Differences below their input's threshold are dropped; the sign is that of the weighted sum of
    the others, and only those that have it are averaged. Inputs are read twice: the memory does
    not grow with their number.
    """
    base, sign, total, counts = room.sums(size, dtype)
    base.copy_(load(0))
    sign.zero_()
    for number, (weight, threshold) in enumerate(zip(weights, thresholds, strict=True), 1):
        for raw, its_base, its_sign in _blocks(load(number), base, sign):
            its_sign.add_(_trimmed(raw, its_base, threshold, room).mul_(weight))
    sign.sign_()
    total.zero_()
    counts.zero_()
    for number, (weight, threshold) in enumerate(zip(weights, thresholds, strict=True), 1):
        for raw, its_base, its_sign, its_total, its_counts in _blocks(
            load(number), base, sign, total, counts
        ):
            change = _trimmed(raw, its_base, threshold, room)
            agrees = (change.sign() == its_sign) & (its_sign != 0)
            its_counts.add_(agrees.to(dtype).mul_(weight))
            its_total.add_(change.mul_(agrees).mul_(weight))
    none = counts == 0
    return total.div_(counts.masked_fill_(none, 1)).mul_(scale).add_(base)


def _trimmed(raw: Tensor, base: Tensor, threshold: float, room: Room) -> Tensor:
    change = room.scratch(raw, base.dtype).sub_(base)
    return change.masked_fill_(change.abs() < threshold, 0)


def _scaled(raw: Tensor, factor: float | None, total: Tensor) -> None:
    total.copy_(raw)
    if factor is not None:
        total.mul_(factor)


def _add(raw: Tensor, factor: float | None, total: Tensor, room: Room) -> None:
    for its_raw, its_total in _blocks(raw, total):
        addend = room.scratch(its_raw, total.dtype)
        its_total.add_(addend if factor is None else addend.mul_(factor))


def _blocks(*tensors: Tensor) -> zip[tuple[Tensor, ...]]:
    return zip(*(tensor.split(BLOCK) for tensor in tensors), strict=True)
