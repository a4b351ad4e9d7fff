"""Bytes a rank needs under each ZeRO stage, from DeepSpeed 0.19.8's own allocations.

The figures follow runtime/zero/stage_1_and_2.py and stage3.py: what is allocated when, in which
dtype, and what is copied on the way. A step passes through phases; its peak is the largest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from triptych_core.config import EngineConfig
from triptych_core.plan.trace import MicroStep

SUB_GROUP = 10**9  # elements ZeRO-3 updates at once: its default sub_group_size
_WIDE = 4  # bytes of a master weight, of an accumulated gradient


@dataclass(frozen=True)
class Group:
    """An optimizer group: elements, the largest parameter's, and bytes of states an element."""

    numel: int
    largest: int
    state_bytes: int = 8


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
        phases = {"backward": always, "step": always}
        sums = _sums(weights, engine, ranks)
        if sums:
            phases["backward"] = always | sums | {"activations": _most(step)}
            phases["step"] = always | sums
        else:
            activations, gradients = _worst(step, width, gas, trained)
            phases["backward"] = always | {"gradients": gradients, "activations": activations}
            phases["step"] = always | {"gradients": width * trained}
    elif stage == 1:
        # Every rank keeps all gradients until the window's end, then moves them through a bucket
        # (and its flattened copy) into its own partition.
        activations, gradients = _worst(step, _WIDE, gas, trained)
        buckets = {"buckets": _WIDE * bucket}
        phases["backward"] = always | buckets | {"gradients": gradients, "activations": activations}
        copy = _WIDE * min(bucket, trained)
        own = {"own gradients": _WIDE * -(-biggest // ranks)} if width == 2 else {}
        phases["reduce"] = (
            always | buckets | {"gradients": _WIDE * trained, "flat copy": copy} | own
        )
        phases["step"] = always | _step(weights, ranks)
    elif stage == 2:
        buckets = {"buckets": 2 * width * bucket, "wide copy": _WIDE * min(bucket, trained)}
        own = {"gradients": _WIDE * -(-trained // ranks)}
        phases["backward"] = always | buckets | own | {"activations": _most(step)}
        phases["step"] = always | _step(weights, ranks)
    else:
        live = min(engine.zero.max_live, weights.numel - weights.persistent)
        own = {"gradients": _WIDE * -(-trained // ranks)}
        phases["backward"] = (
            always | own | {"gathered layers": width * live, "activations": _most(step)}
        )
        # Our step reads gradients where they lie (lean_step); DeepSpeed's, which offloading needs,
        # flattens those of a sub-group again.
        offloads = engine.zero.offload_optimizer or engine.zero.offload_params
        flat = _WIDE * min(SUB_GROUP, -(-biggest // ranks)) if offloads else 0
        phases["step"] = always | own | {"flat gradients": flat}
    return MemoryPlan(stage, phases)


def resident(weights: Weights, engine: EngineConfig, *, stage: int, ranks: int) -> dict[str, int]:
    """Bytes that are there all the time: weights, fp32 masters, optimizer states, fixed buckets."""
    width = 2 if engine.precision == "bf16" else 4
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


def _sums(weights: Weights, engine: EngineConfig, ranks: int) -> dict[str, int]:
    """ZeRO-0: where gradients are summed over micro-steps or ranks; nothing on one rank alone."""
    low, several = engine.precision == "bf16", engine.gradient_accumulation_steps > 1
    if ranks == 1 and not (low and several):
        return {}
    rounds = low and engine.reduce_dtype == "bf16" and ranks > 1
    width = 2 if rounds and not several else _WIDE
    sent = 2 * weights.trained if rounds and several else 0
    return {"gradient sums": width * weights.trained, "sent": sent}


def _step(weights: Weights, ranks: int) -> dict[str, int]:
    """ZeRO-1 and 2: the rank's gradients; the norm is taken of fp64 copies, one at a time."""
    largest = max((group.largest for group in weights.groups), default=0)
    return {"gradients": _WIDE * -(-weights.trained // ranks), "fp64 copy": 8 * largest}


def _most(step: MicroStep) -> int:
    return max(live for live, _ in step.moments)


def _worst(step: MicroStep, width: int, gas: int, trained: int) -> tuple[int, int]:
    """Bytes of activations and of gradients at the moment when both together are most."""
    if gas > 1:  # from the second micro-step on all gradients are there from the start
        return _most(step), width * trained
    live, arrived = max(step.moments, key=lambda moment: moment[0] + width * moment[1])
    return live, width * arrived
