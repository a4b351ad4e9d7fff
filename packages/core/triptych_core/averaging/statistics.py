"""What a method must know of whole tensors before it combines them, by passes over their files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from triptych_core.averaging.combine import BLOCK

# Elements `begin` to `end` of one input's tensor; valid until the next call for the same number.
Load = Callable[[int, int, int], Tensor]


def slerp_weights(load: Load, size: int, position: float) -> tuple[float, float]:
    """What two tensors count at a position on the arc between them, as vectors.

    Where they are parallel or one is zero, the position on the straight line.
    Sums are of blocks in fp64, in order, whatever else runs.
    """
    products = torch.zeros(3, dtype=torch.float64)
    for begin, end in _stretches(size):
        one, two = (load(number, begin, end).double() for number in (0, 1))
        products += torch.stack([one.dot(one), two.dot(two), one.dot(two)])
    ours, theirs, both = products.tolist()
    cosine = both / math.sqrt(ours * theirs) if ours > 0 and theirs > 0 else 1.0
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    if math.sin(angle) < 1e-6:
        return 1 - position, position
    return (
        math.sin((1 - position) * angle) / math.sin(angle),
        math.sin(position * angle) / math.sin(angle),
    )


def ties_threshold(load: Load, number: int, size: int, density: float) -> float:
    """Size of the smallest difference from the base, in fp32, among the `density` largest.

    Exact: a float's bits without its sign are in the order of the floats, so two counts of sixteen
    bits each find it.
    """
    wanted = max(1, round(density * size))
    if wanted >= size:
        return 0.0
    upper = torch.zeros(1 << 15, dtype=torch.int64)
    for bits in _bits(load, number, size):
        upper += torch.bincount(bits >> 16, minlength=1 << 15)
    high, above = _place_from_top(upper, wanted)
    lower = torch.zeros(1 << 16, dtype=torch.int64)
    for bits in _bits(load, number, size):
        lower += torch.bincount(bits[(bits >> 16) == high] & 0xFFFF, minlength=1 << 16)
    low, _ = _place_from_top(lower, wanted - above)
    return torch.tensor([(high << 16) | low], dtype=torch.int32).view(torch.float32).item()


def _bits(load: Load, number: int, size: int) -> Iterator[Tensor]:
    for begin, end in _stretches(size):
        change = load(number, begin, end).float() - load(0, begin, end).float()
        yield change.abs_().view(torch.int32)


def _place_from_top(counts: Tensor, wanted: int) -> tuple[int, int]:
    """The bucket with the `wanted`-th from the top, and how many are in those above it."""
    from_top = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, wanted))
    above = int(from_top[place - 1]) if place else 0
    return counts.numel() - 1 - place, above


def _stretches(size: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, size, BLOCK):
        yield begin, min(begin + BLOCK, size)
