"""Bytes a rank needs under each ZeRO stage, from the engines' own allocations.

Ours at stages 0 to 2 (`divided` has the formula of 1 and 2), DeepSpeed 0.19.8's at stage 3 and
where something is offloaded (runtime/zero/stage3.py, stage_1_and_2.py): what is allocated when, in
which dtype, and what is copied on the way. A step passes through phases; its peak is the largest.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

from triptych_core.config import EngineConfig
from triptych_core.plan.divided import Sizes, buckets_of, gradient_bytes, widths
from triptych_core.plan.trace import MicroStep

SUB_GROUP = 10**9  # elements ZeRO-3 updates at once: its default sub_group_size
_WIDE = 4  # bytes of a master weight, of an accumulated gradient


@dataclass(frozen=True)
class Group:
    """An optimizer group: elements of each parameter, and bytes of states an element."""

    sizes: Sizes
    state_bytes: int = 8

    @property
    def numel(self) -> int:
        """Elements of all."""
        return sum(self.sizes.values())


@dataclass(frozen=True)
class Weights:
    """What of a model the engine's memory depends on, in elements."""

    numel: int
    groups: Sequence[Group]
    persistent: int = 0  # in parameters that ZeRO-3 leaves whole

    @property
    def trained(self) -> int:
        """Elements that train."""
        return sum(group.numel for group in self.groups)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by name for each phase of a step; `peak` is of the largest phase."""

    stage: int
    phases: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def peak_phase(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> int:
        """Bytes of the largest phase."""
        return sum(self.phases[self.peak_phase].values())


def plan_memory(
    weights: Weights, engine: EngineConfig, step: MicroStep, *, stage: int, ranks: int
) -> MemoryPlan:
    """Bytes of one rank in the phases of a step; offloaded states are left out."""
    width = 2 if engine.precision == "bf16" else 4
    always = resident(weights, engine, stage=stage, ranks=ranks)
    bucket = engine.zero.bucket_size
    trained, gas = weights.trained, engine.gradient_accumulation_steps
    biggest = max((group.numel for group in weights.groups), default=0)
    phases: dict[str, dict[str, int]] = {}
    if stage == 0:
        sums = _sums(weights, engine, ranks)
        backward = sums | {"activations": _most(step)} if sums else _own(step, width, gas, trained)
        phases["backward"] = always | backward
        phases["step"] = always | (sums or {"gradients": width * trained})
    elif stage < 3 and not engine.zero.offloads:
        phases["backward"] = always | _divided(weights, engine, step, stage=stage, ranks=ranks)
        kept = widths(engine, stage).kept
        phases["step"] = always | {"gradients": kept * padded(weights, engine, ranks) // ranks}
    elif stage < 3:
        buckets = {"buckets": 2 * width * bucket, "wide copy": _WIDE * min(bucket, trained)}
        own = {"gradients": _WIDE * -(-trained // ranks)}
        phases["backward"] = always | buckets | own | {"activations": _most(step)}
        phases["step"] = always | own
    else:
        live = min(engine.zero.max_live, weights.numel - weights.persistent)
        own = {"gradients": _WIDE * -(-trained // ranks)}
        phases["backward"] = (
            always | own | {"gathered layers": width * live, "activations": _most(step)}
        )
        # Our step reads gradients where they lie (lean_step); DeepSpeed's, which offloading needs,
        # flattens those of a sub-group again.
        flat = _WIDE * min(SUB_GROUP, -(-biggest // ranks)) if engine.zero.offloads else 0
        phases["step"] = always | own | {"flat gradients": flat}
    return MemoryPlan(stage, phases)


def resident(weights: Weights, engine: EngineConfig, *, stage: int, ranks: int) -> dict[str, int]:
    """Bytes that are there all the time: weights, fp32 masters, optimizer states."""
    width = 2 if engine.precision == "bf16" else 4
    if stage in (1, 2) and not engine.zero.offloads:
        return _resident_divided(weights, engine, width, ranks)
    parts = ranks if stage > 0 else 1
    whole = weights.persistent if stage == 3 else weights.numel
    rest = -(-(weights.numel - whole) // ranks)
    held = {"weights": width * (whole + rest)}
    if not engine.zero.offload_optimizer:
        has_masters = width == 2 or stage > 0
        masters = sum(-(-group.numel // parts) for group in weights.groups) * _WIDE
        states = sum(-(-group.numel // parts) * group.state_bytes for group in weights.groups)
        held |= {"masters": masters if has_masters else 0, "optimizer states": states}
    if stage == 3 and engine.zero.offload_params:
        held["weights"] = 0
    return held


def padded(weights: Weights, engine: EngineConfig, ranks: int) -> int:
    """Elements that train in the buckets of ZeRO-1 and 2."""
    return sum(_padded(group, engine, ranks) for group in weights.groups)


def _resident_divided(
    weights: Weights, engine: EngineConfig, width: int, ranks: int
) -> dict[str, int]:
    total = padded(weights, engine, ranks)
    states = (_padded(group, engine, ranks) * group.state_bytes for group in weights.groups)
    return {
        "weights": width * (weights.numel - weights.trained + total),
        "masters": _WIDE * total // ranks if width == 2 else 0,
        "optimizer states": sum(states) // ranks,
    }


def _padded(group: Group, engine: EngineConfig, ranks: int) -> int:
    buckets = buckets_of([group.sizes], engine.zero.bucket_size, ranks)
    return sum(bucket.numel for bucket in buckets)


def _divided(
    weights: Weights, engine: EngineConfig, step: MicroStep, *, stage: int, ranks: int
) -> dict[str, int]:
    """ZeRO-1 and 2: activations and gradients at the moment when both together are most.

    A gradient is in its bucket before autograd lets go of it.
    """
    sizes = [group.sizes for group in weights.groups]
    found = gradient_bytes(sizes, engine, stage=stage, ranks=ranks)
    arrived = [elements for elements, _ in found]

    def gradients(moment: tuple[int, int]) -> int:
        return found[min(bisect_right(arrived, moment[1]), len(found) - 1)][1]

    moment = max(step.moments, key=lambda moment: moment[0] + gradients(moment))
    return {"gradients": gradients(moment), "activations": moment[0]}


def _sums(weights: Weights, engine: EngineConfig, ranks: int) -> dict[str, int]:
    """ZeRO-0: where gradients are summed over micro-steps or ranks; nothing on one rank alone."""
    low, several = engine.precision == "bf16", engine.gradient_accumulation_steps > 1
    if ranks == 1 and not (low and several):
        return {}
    rounds = low and engine.reduce_dtype == "bf16" and ranks > 1
    width = 2 if rounds and not several else _WIDE
    sent = 2 * weights.trained if rounds and several else 0
    return {"gradient sums": width * weights.trained, "sent": sent}


def _most(step: MicroStep) -> int:
    return max(live for live, _ in step.moments)


def _own(step: MicroStep, width: int, gas: int, trained: int) -> dict[str, int]:
    """Gradients where autograd leaves them, when they and activations together are most."""
    if gas > 1:  # from the second micro-step on all gradients are there from the start
        return {"gradients": width * trained, "activations": _most(step)}
    live, arrived = max(step.moments, key=lambda moment: moment[0] + width * moment[1])
    return {"gradients": width * arrived, "activations": live}
