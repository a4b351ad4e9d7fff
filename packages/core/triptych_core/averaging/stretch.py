"""One stretch of one output tensor, and what must be known of the tensor before."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from triptych_core.averaging.combine import BLOCK, Load, Room, linear, task_arithmetic, ties
from triptych_core.averaging.direct import Landing
from triptych_core.averaging.layout import Slot
from triptych_core.averaging.plan import Plan
from triptych_core.averaging.statistics import slerp_weights, ties_threshold
from triptych_core.averaging.stored import Reader


@dataclass(frozen=True)
class Terms:
    """How the elements of one tensor are made.

    Args:
        copied: the input they are copied from, if they are.
        weights: of the inputs, or of those after the base.
        thresholds: of the differences of those after the base.
    """

    copied: int | None
    weights: tuple[float, ...] = ()
    thresholds: tuple[float, ...] = ()


def terms_of(plan: Plan, name: str, reader: Reader) -> Terms:
    """The terms of a tensor; slerp and ties read it for them."""
    recipe, stored = plan.recipe, plan.sources[0].tensors[name]
    if not recipe.is_averaged(name, stored):
        return Terms(recipe.copy_from)
    weights = recipe.weights_of(name)
    if recipe.method in ("linear", "task-arithmetic"):
        return Terms(None, weights)
    tensors = [source.tensors[name] for source in plan.sources]
    buffers = [Landing(BLOCK * stored.dtype.itemsize) for _ in range(2)]

    def load(number: int, begin: int, end: int) -> Tensor:
        return reader.read(tensors[number], begin, end, buffers[min(number, 1)])

    if recipe.method == "slerp":
        return Terms(None, slerp_weights(load, stored.size, recipe.position))
    others = range(1, len(tensors))
    thresholds = [ties_threshold(load, n, stored.size, recipe.density) for n in others]
    return Terms(None, weights, tuple(thresholds))


def make_stretch(
    plan: Plan, slot: Slot, terms: Terms, begin: int, target: Tensor, reader: Reader, room: Room
) -> None:
    """Fill a target with the elements of an output tensor from `begin` on.

    Raises:
        ValueError: one is not finite, or is too large for the output's dtype.
    """
    tensors, end = [source.tensors[slot.name] for source in plan.sources], begin + target.numel()
    if terms.copied is not None:
        target.copy_(reader.read(tensors[terms.copied], begin, end, room.landing))
        return
    result = combined(
        plan,
        terms,
        lambda number: reader.read(tensors[number], begin, end, room.landing),
        end - begin,
        room,
        tensors[0].dtype,
    )
    _check_finite(result, slot)
    target.copy_(result)


def combined(
    plan: Plan, terms: Terms, load: Load, size: int, room: Room, dtype: torch.dtype
) -> Tensor:
    """A stretch in the dtype of accumulation: fp32, for fp64 inputs fp64."""
    recipe = plan.recipe
    wide = dtype if dtype == torch.float64 else torch.float32
    if recipe.method == "task-arithmetic":
        return task_arithmetic(load, terms.weights, recipe.scale, size, room, wide)
    if recipe.method == "ties":
        # Its thresholds are of differences in fp32.
        return ties(load, terms.weights, terms.thresholds, recipe.scale, size, room, torch.float32)
    return linear(load, terms.weights, size, room, wide)


def _check_finite(result: Tensor, slot: Slot) -> None:
    # A sum passes NaN and infinity on at a sixth of the cost of looking for the extremes.
    if slot.dtype != torch.float16 and math.isfinite(result.sum().item()):
        return
    least, most = (bound.item() for bound in torch.aminmax(result))
    largest = torch.finfo(slot.dtype).max
    if not (-largest <= least and most <= largest):  # false for NaN too
        raise ValueError(
            f"{slot.name}: must be finite in {slot.dtype}, got values from {least:g} to {most:g}; "
            "look at the inputs, --exclude it or choose another --dtype"
        )
