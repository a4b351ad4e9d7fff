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
    """An optimizer group: elements that a rank has of each parameter, bytes of states an element.

    holders ranks have a part each (of experts): what one of them has, `ranks / holders` have.
    """

    sizes: Sizes
    state_bytes: int = 8
    holders: int = 1

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
        phases["step"] = always | {"gradients": kept * own_part(weights, engine, ranks)}
    elif stage < 3:
        buckets = {"buckets": 2 * width * bucket, "wide copy": _WIDE * min(bucket, trained)}
        own = {"gradients": _WIDE * -(-trained // ranks)}
        phases["backward"] = always | buckets | own | {"activations": _most(step)}
        phases["step"] = always | own
    else:
        live = min(engine.zero.max_live, weights.numel - weights.persistent)
        own = {"gradients": _WIDE * sum(_share(group, ranks) for group in weights.groups)}
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
    whole = weights.persistent if stage == 3 else weights.numel
    rest = _rest(weights, ranks) if stage == 3 else 0
    held = {"weights": width * (whole + rest)}
    if not engine.zero.offload_optimizer:
        has_masters = width == 2 or stage > 0
        shares = [(_share(g, ranks) if stage > 0 else g.numel, g) for g in weights.groups]
        masters = sum(share for share, _ in shares) * _WIDE
        states = sum(share * group.state_bytes for share, group in shares)
        held |= {"masters": masters if has_masters else 0, "optimizer states": states}
    if stage == 3 and engine.zero.offload_params:
        held["weights"] = 0
    return held


def own_part(weights: Weights, engine: EngineConfig, ranks: int) -> int:
    """Elements that train in a rank's parts of the buckets of ZeRO-1 and 2."""
    return sum(_own_part(group, engine, ranks) for group in weights.groups)


def _resident_divided(
    weights: Weights, engine: EngineConfig, width: int, ranks: int
) -> dict[str, int]:
    total = sum(_padded(group, engine, ranks) for group in weights.groups)
    states = (_own_part(group, engine, ranks) * group.state_bytes for group in weights.groups)
    return {
        "weights": width * (weights.numel - weights.trained + total),
        "masters": _WIDE * own_part(weights, engine, ranks) if width == 2 else 0,
        "optimizer states": sum(states),
    }


def _padded(group: Group, engine: EngineConfig, ranks: int) -> int:
    buckets = buckets_of([(group.sizes, ranks // group.holders)], engine.zero.bucket_size)
    return sum(bucket.numel for bucket in buckets)


def _own_part(group: Group, engine: EngineConfig, ranks: int) -> int:
    return _padded(group, engine, ranks) // (ranks // group.holders)


def _share(group: Group, ranks: int) -> int:
    """A rank's elements of a group that is cut evenly over those that have the same of it."""
    return -(-group.numel // (ranks // group.holders))


def _rest(weights: Weights, ranks: int) -> int:
    """ZeRO-3: a rank's elements of the weights that are cut; all ranks have the same of frozen."""
    divided = [group for group in weights.groups if group.holders > 1]
    alike = weights.numel - weights.persistent - sum(group.numel for group in divided)
    return -(-alike // ranks) + sum(_share(group, ranks) for group in divided)


def _divided(
    weights: Weights, engine: EngineConfig, step: MicroStep, *, stage: int, ranks: int
) -> dict[str, int]:
    """ZeRO-1 and 2: activations and gradients at the moment when both together are most.

    A gradient is in its bucket before autograd lets go of it.
    """
    groups = [(group.sizes, ranks // group.holders) for group in weights.groups]
    found = gradient_bytes(groups, engine, stage=stage)
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
