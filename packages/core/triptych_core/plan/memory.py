"""Bytes a rank needs under each ZeRO stage, from the engines' own allocations.

Ours (`divided` has the formula of stages 1 to 3), DeepSpeed 0.19.8's where something is offloaded
(runtime/zero/stage3.py, stage_1_and_2.py): what is allocated when, in
which dtype, and what is copied on the way. A step passes through phases; its peak is the largest.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

from triptych_core.config import EngineConfig
from triptych_core.plan.divided import (
    Bucket,
    Layers,
    Sizes,
    buckets_of,
    gathered_elements,
    gradient_bytes,
    received_elements,
    widths,
)
from triptych_core.plan.trace import MicroStep

SUB_GROUP = 10**9  # elements ZeRO-3 updates at once: its default sub_group_size
_WIDE = 4  # bytes of a master weight, of an accumulated gradient


@dataclass(frozen=True)
class Group:
    """An optimizer group: elements that a rank has of each parameter, bytes of states an element.

    holders ranks have a part each (of experts): what one of them has, `ranks / holders` have.
    width: bytes of a weight; 4 where they stay fp32, and are their own masters.
    """

    sizes: Sizes
    state_bytes: int = 8
    holders: int = 1
    width: int = 2

    @property
    def numel(self) -> int:
        """Elements of all."""
        return sum(self.sizes.values())


@dataclass(frozen=True)
class Weights:
    """What of a model the engine's memory depends on, in elements."""

    numel: int
    groups: Sequence[Group]
    persistent: int = 0  # in parameters that DeepSpeed's ZeRO-3 leaves whole
    layers: Layers = field(default_factory=dict)  # of what our ZeRO-3 gathers with a layer
    frozen: Sequence[Group] = ()  # what does not train, by how many hold parts of it
    beside: int = 0  # bytes of networks that are whole on every rank under every stage

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
        own = {"gradients": sum(group.width * group.numel for group in weights.groups)}
        phases["step"] = always | (sums or own)
    elif not engine.zero.offloads:
        layers = weights.layers if stage == 3 else {}
        whole = _gathered(weights, engine, ranks) if stage == 3 else 0
        phases["backward"] = (
            always
            | {"gathered layers": width * whole}
            | _divided(weights, engine, step, layers, stage=stage, ranks=ranks)
        )
        kept = widths(engine, stage).kept * _parts(weights.groups, engine, ranks, layers)
        phases["step"] = always | {"gradients": kept}
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
        # DeepSpeed's step flattens the gradients of a sub-group again.
        flat = _WIDE * min(SUB_GROUP, -(-biggest // ranks))
        phases["step"] = always | own | {"flat gradients": flat}
    return MemoryPlan(stage, phases)


def resident(weights: Weights, engine: EngineConfig, *, stage: int, ranks: int) -> dict[str, int]:
    """Bytes that are there all the time: weights, fp32 masters, optimizer states, and networks
    beside the model."""
    width = 2 if engine.precision == "bf16" else 4
    beside = {"frozen networks": weights.beside} if weights.beside else {}
    if stage == 0:
        return beside | _resident_whole(weights, width)
    if not engine.zero.offloads:
        return beside | _resident_divided(weights, engine, width, stage=stage, ranks=ranks)
    whole = weights.persistent if stage == 3 else weights.numel
    rest = _rest(weights, ranks) if stage == 3 else 0
    held = {"weights": width * (whole + rest)}
    if not engine.zero.offload_optimizer:
        shares = [(_share(group, ranks), group) for group in weights.groups]
        masters = sum(share for share, _ in shares) * _WIDE
        states = sum(share * group.state_bytes for share, group in shares)
        held |= {"masters": masters, "optimizer states": states}
    if stage == 3 and engine.zero.offload_params:
        held["weights"] = 0
    return beside | held


def _resident_whole(weights: Weights, width: int) -> dict[str, int]:
    frozen = width * (weights.numel - weights.trained)
    return {
        "weights": frozen + sum(group.width * group.numel for group in weights.groups),
        "masters": sum(_WIDE * g.numel for g in weights.groups if g.width < _WIDE),
        "optimizer states": sum(group.state_bytes * group.numel for group in weights.groups),
    }


def _resident_divided(
    weights: Weights, engine: EngineConfig, width: int, *, stage: int, ranks: int
) -> dict[str, int]:
    layers = weights.layers if stage == 3 else {}
    own = [(_parts([group], engine, ranks, layers), group) for group in weights.groups]
    if stage == 3:
        held = width * _parts(weights.frozen, engine, ranks, layers)
        held += sum(group.width * part for part, group in own)
    else:
        held = width * (weights.numel - weights.trained)
        for group in weights.groups:
            buckets = _buckets([group], engine, ranks, layers)
            held += group.width * sum(bucket.numel for bucket in buckets)
    return {
        "weights": held,
        "masters": sum(_WIDE * part for part, group in own if group.width < _WIDE),
        "optimizer states": sum(part * group.state_bytes for part, group in own),
    }


def _gathered(weights: Weights, engine: EngineConfig, ranks: int) -> int:
    groups = [*weights.groups, *weights.frozen]
    return gathered_elements(_buckets(groups, engine, ranks, weights.layers), engine.zero.max_live)


def received(weights: Weights, engine: EngineConfig, ranks: int) -> float:
    """Elements of other ranks' weights that a rank receives in a step under our ZeRO-3."""
    trained = _buckets(weights.groups, engine, ranks, weights.layers)
    frozen = _buckets(weights.frozen, engine, ranks, weights.layers)
    gas = engine.gradient_accumulation_steps
    return received_elements(trained, frozen, engine.zero.max_live, gas)


def _buckets(
    groups: Sequence[Group], engine: EngineConfig, ranks: int, layers: Layers
) -> list[Bucket]:
    cuts = [(group.sizes, ranks // group.holders) for group in groups]
    return buckets_of(cuts, engine.zero.bucket_size, layers)


def _parts(groups: Sequence[Group], engine: EngineConfig, ranks: int, layers: Layers) -> int:
    """Elements in a rank's parts of the groups' buckets."""
    return sum(bucket.part for bucket in _buckets(groups, engine, ranks, layers))


def _share(group: Group, ranks: int) -> int:
    """A rank's elements of a group that is cut evenly over those that have the same of it."""
    return -(-group.numel // (ranks // group.holders))


def _rest(weights: Weights, ranks: int) -> int:
    """ZeRO-3: a rank's elements of the weights that are cut; all ranks have the same of frozen."""
    divided = [group for group in weights.groups if group.holders > 1]
    alike = weights.numel - weights.persistent - sum(group.numel for group in divided)
    return -(-alike // ranks) + sum(_share(group, ranks) for group in divided)


def _divided(
    weights: Weights,
    engine: EngineConfig,
    step: MicroStep,
    layers: Layers,
    *,
    stage: int,
    ranks: int,
) -> dict[str, int]:
    """ZeRO-1 to 3: activations and gradients at the moment when both together are most.

    A gradient is in its bucket before autograd lets go of it.
    """
    groups = [(group.sizes, ranks // group.holders) for group in weights.groups]
    found = gradient_bytes(groups, engine, stage=stage, layers=layers)
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
