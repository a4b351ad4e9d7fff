"""The plan of a run: what fits, how long a step takes, and what should be chosen.

Nothing here runs on a device: a micro-step is traced on fake tensors (memory_trace), the engine's
allocations are added (memory_plan) and its work is divided by measured ceilings (speed_plan).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from triptych_core.config import OptimConfig, StageConfig
from triptych_core.engine.cut_weights import layer_numbers
from triptych_core.parallel.expert import expert_part
from triptych_core.plan.config import PlanConfig
from triptych_core.plan.memory import Group, MemoryPlan, Weights, plan_memory
from triptych_core.plan.speed import SpeedPlan, plan_speed
from triptych_core.plan.trace import (
    Crossings,
    Formulas,
    MicroStep,
    Workspaces,
    trace_micro_step,
)

GIB = 2**30
DEFAULT_MEMORY = 79.1 * GIB  # of an "80 GB" H100, by torch.cuda.get_device_properties


class Traced(NamedTuple):
    """A micro-step, and its FLOPs as the model counts them."""

    step: MicroStep
    flops: float


class Unit(NamedTuple):
    """What the size of a micro-batch counts: in what steps, by which keys, in which words."""

    key: str
    """of the configuration"""
    words: str
    longest: str
    """over the largest size that fits"""
    names: tuple[str, str]
    """of a size, and of the largest that fits, in JSON"""
    step: int
    remedy_step: int


ROWS = Unit(
    "data.seq_len", "rows of {:,} tokens", "longest row", ("seq_len", "longest_seq_len"), 1024, 256
)
SAMPLES = Unit(
    "data.batch_size",
    "batches of {:,} samples",
    "largest batch",
    ("batch_size", "largest_batch_size"),
    1,
    1,
)
WAYS = ("none", "selective", "full", "offload")
Stage = TypeVar("Stage", bound=StageConfig)
Trace = Callable[[int, str], Traced]  # (size, checkpointing) -> a traced micro-step


@dataclass(frozen=True)
class Choice:
    """One way to run: its ZeRO stage and checkpointing, what it needs and how fast it is."""

    stage: int
    checkpointing: str
    memory: MemoryPlan
    speed: SpeedPlan
    fits: bool
    longest: int = 0
    """The largest size that fits, in steps of the plan's unit; 0 where none does, and where one of
    the choices fits and none is shown."""


@dataclass(frozen=True)
class Plan:
    """All choices for a machine; `chosen` is the lowest stage that fits, or None."""

    choices: Sequence[Choice]
    chosen: Choice | None
    ranks: int
    size: int  # of a micro-batch: tokens of its row, or samples
    limit: float  # bytes a rank may use
    parameters: int
    sequence: int = 1  # ranks that hold one row
    unit: Unit = ROWS
    may_offload: bool = True  # by the stage's rules

    def why(self) -> str:
        """One line: what was chosen, and why not what is less."""
        if self.chosen is None:
            least = min(self.choices, key=lambda choice: choice.memory.peak)
            return (
                f"nothing fits: ZeRO-{least.stage} with {least.checkpointing} checkpointing needs "
                f"{least.memory.peak / GIB:.1f} of {self.limit / GIB:.1f} GiB at "
                f"{self.unit.key}={self.size}; {remedy(self)}"
            )
        chosen = self.chosen
        return (
            f"ZeRO-{chosen.stage}, {chosen.checkpointing} checkpointing: "
            f"{chosen.memory.peak / GIB:.1f} of {self.limit / GIB:.1f} GiB on {self.ranks} "
            f"rank{'s' * (self.ranks > 1)}{self._lower()}"
        )

    def _lower(self) -> str:
        """What the next lower stage would have needed."""
        assert self.chosen is not None
        for choice in reversed(self.choices):
            if (
                choice.checkpointing == self.chosen.checkpointing
                and choice.stage < self.chosen.stage
            ):
                return f"; ZeRO-{choice.stage} would need {choice.memory.peak / GIB:.1f}"
        return "; the lowest stage"


def weights_of(
    model: nn.Module,
    groups: Iterable[Mapping[str, Any]],
    threshold: int,
    config: OptimConfig,
    layers: Iterable[nn.Module] = (),
    beside: Iterable[nn.Module] = (),
) -> Weights:
    """Elements of a model and of its optimizer's groups, and bytes of their states.

    AdamW has two of `state_dtype`; a group with a "rule", Muon's, has one of fp32; the average
    of `ema_decay` is another of fp32. `layers` of the model, in the order in which they run, are
    what ZeRO-3 gathers; parameters of up to `threshold` elements it gathers at once. `beside` the
    model are networks that never train, whole on every rank.
    """
    adamw = {"fp32": 8, "bf16": 4}[config.state_dtype]
    average = 0 if config.ema_decay is None else 4
    parameters = list(model.parameters())
    arrival = {p: i for i, p in enumerate(reversed(parameters))}
    small = sum(p.numel() for p in parameters if p.numel() <= threshold)
    return Weights(
        sum(p.numel() for p in parameters),
        [
            Group(
                {arrival[p]: p.numel() for p in group["params"]},
                state_bytes=average + (4 if group.get("rule") == "muon" else adamw),
                holders=expert_part(group["params"][0])[1],
                width=group["params"][0].element_size(),
            )
            for group in groups
        ],
        persistent=small,
        layers={arrival[p]: n for p, n in layer_numbers(layers, threshold).items()},
        frozen=[
            Group({arrival[p]: p.numel() for p in some}, state_bytes=0, holders=holders)
            for holders, some in _by_holders(p for p in parameters if not p.requires_grad).items()
        ],
        beside=sum(p.numel() * p.element_size() for net in beside for p in net.parameters()),
    )


def _by_holders(parameters: Iterable[nn.Parameter]) -> dict[int, list[nn.Parameter]]:
    found: dict[int, list[nn.Parameter]] = {}
    for parameter in parameters:
        found.setdefault(expert_part(parameter)[1], []).append(parameter)
    return found


def tracer(
    model: Any,
    make_batch: Callable[[int], dict[str, Any]],
    workspaces: Workspaces,
    *,
    crossings: Crossings | None = None,
    formulas: Formulas | None = None,
    begin: Callable[[dict[str, Any]], Any] | None = None,
    part: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    sequence: int = 1,
    beside: Iterable[nn.Module] = (),
) -> Trace:
    """How to trace a micro-step of a model with fake tensors; call the result where they are made.

    Args:
        model: an nn.Module that returns a `loss_sum`, has `set_checkpointing(way)` and
            `flops(batch)`.
        make_batch: size -> a batch, e.g. tokens -> a row.
        workspaces, crossings, formulas: see trace_micro_step.
        begin: what is done before the forward of a batch, and belongs to the micro-step, which
            holds what is returned.
        part: what a rank computes of a row that `sequence` ranks hold between them.
        beside: networks that the model asks, and that are none of its modules.
    """
    nets = [model, *beside]
    there = [x for net in nets for x in [*net.buffers(), *net.parameters()]]

    def trace(size: int, checkpointing: str) -> Traced:
        model.set_checkpointing(checkpointing)
        row = make_batch(size)
        batch = part(row)
        given = [value for value in batch.values() if isinstance(value, Tensor)]

        held = []

        def forward() -> Tensor:
            if begin is not None:
                held.append(begin(batch))
            loss: Tensor = model(**batch).loss_sum
            return loss

        step = trace_micro_step(
            forward,
            model.parameters(),
            [*there, *given],
            workspaces,
            crossings,
            formulas,
        )
        with unset_fake_temporarily():  # lengths of documents are real, and are read
            return Traced(step, model.flops(row) / sequence)

    return trace


def plan_run(
    config: StageConfig, weights: Weights, trace: Trace, *, size: int, unit: Unit = ROWS
) -> Plan:
    """Weigh what the configuration leaves open; to show, all that it could say instead."""
    stage, way = config.engine.zero.stage, config.engine.checkpointing
    shows = config.plan.show != "no"
    stages = range(4) if shows or stage == "auto" else [stage]
    ways = WAYS if shows or way == "auto" else [way]
    sequence, expert = config.parallel.sequence, config.parallel.expert
    least = math.lcm(sequence, expert)
    ranks = config.plan.ranks or int(os.environ.get("WORLD_SIZE", least))
    if ranks % least:
        raise ValueError(
            f"plan.ranks: must be a multiple of parallel.sequence ({sequence}) and parallel.expert "
            f"({expert}), got {ranks}; plan for {least} ranks or more"
        )
    return make_plan(
        config,
        weights,
        trace,
        size=size,
        unit=unit,
        ranks=ranks,
        memory=device_memory(config),
        candidates=[(s, w) for w in ways for s in stages if _allows(config, s, w)],
    )


def with_choice(config: Stage, stage: int | str, checkpointing: str) -> Stage:
    """The configuration with another stage and checkpointing.

    Raises ValidationError where the stage's rules forbid that.
    """
    tree = config.model_dump()
    tree["engine"]["checkpointing"] = checkpointing
    tree["engine"]["zero"]["stage"] = stage
    return type(config).model_validate(tree)


def _may_offload(config: StageConfig) -> bool:
    tree = config.model_dump()
    tree["engine"]["zero"] |= {"stage": "auto", "offload_optimizer": True}
    try:
        type(config).model_validate(tree)
    except ValidationError:
        return False
    return True


def _allows(config: StageConfig, stage: int | str, checkpointing: str) -> bool:
    try:
        with_choice(config, stage, checkpointing)
    except ValidationError:
        return False
    return True


def show_plan(plan: Plan, assumed: PlanConfig) -> None:
    """Print the plan as `plan.show` says, once for all ranks."""
    if os.environ.get("RANK", "0") == "0":
        print(plan_to_json(plan) if assumed.show == "json" else render_plan(plan))  # noqa: T201


def device_memory(config: StageConfig) -> float:
    """Bytes of a device: what the configuration says, or what this machine's has."""
    if config.plan.gpu_memory_gib is not None:
        return config.plan.gpu_memory_gib * GIB
    if config.run.device != "cpu" and torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    if config.plan.show != "no":
        return DEFAULT_MEMORY  # planned for another machine
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks


def make_plan(
    config: StageConfig,
    weights: Weights,
    trace: Trace,
    *,
    size: int,
    unit: Unit = ROWS,
    ranks: int,
    memory: float,
    candidates: Sequence[tuple[int, str]],
) -> Plan:
    """Weigh candidates for micro-batches of a size.

    Args:
        config: precision, accumulation, buckets, and what `plan` assumes.
        weights: elements.
        trace: runs a micro-step on fake tensors; called once per way of checkpointing, and where
            the largest size is asked for (to show the plan, or as nothing fits) at another size,
            since memory is a line in the size.
        size: tokens of a row, or samples of a batch.
        unit: which of them.
        ranks: data-parallel ranks.
        memory: bytes of a device.
        candidates: pairs of ZeRO stage and checkpointing to weigh.
    """
    limit = memory * (1 - config.plan.headroom)
    choices = []
    trace = cache(trace)
    n = config.parallel.sequence
    other = max(size // 2 // n, 1) * n
    if other == size:
        other = 2 * size
    least = trace(size, "none").step.products
    for way in dict.fromkeys(way for _, way in candidates):
        here = trace(size, way)
        for stage in (stage for stage, its_way in candidates if its_way == way):
            at = {"stage": stage, "ranks": ranks}
            plan = plan_memory(weights, config.engine, here.step, **at)
            speed = plan_speed(
                weights,
                config.engine,
                here.step,
                flops=here.flops,
                recomputed=here.step.products - least,
                device=config.plan.device,
                **at,
            )
            choices.append(Choice(stage, way, plan, speed, plan.peak <= limit))
    if config.plan.show != "no" or not any(choice.fits for choice in choices):
        for index, choice in enumerate(choices):
            at = {"stage": choice.stage, "ranks": ranks}
            elsewhere = trace(other, choice.checkpointing).step
            beside = plan_memory(weights, config.engine, elsewhere, **at)
            longest = _longest(choice.memory, beside, (size, other), limit, unit.step)
            choices[index] = replace(choice, longest=longest)
    return Plan(
        choices,
        _choose(choices),
        ranks,
        size,
        limit,
        weights.numel,
        n,
        unit,
        _may_offload(config),
    )


def _choose(choices: Sequence[Choice]) -> Choice | None:
    """With the checkpointing of the fastest that fits, the lowest stage that fits."""
    fitting = [choice for choice in choices if choice.fits]
    if not fitting:
        return None
    way = min(fitting, key=lambda choice: choice.speed.seconds).checkpointing
    return min(
        (choice for choice in fitting if choice.checkpointing == way),
        key=lambda choice: choice.stage,
    )


def _longest(
    plan: MemoryPlan, beside: MemoryPlan, sizes: tuple[int, int], limit: float, step: int
) -> int:
    """Each phase is a line through its values at two sizes; the first to end."""
    size, other = sizes
    longest = 2**20
    for name, parts in plan.phases.items():
        here, there = sum(parts.values()), sum(beside.phases[name].values())
        slope = max(0.0, (here - there) / (size - other))
        fixed = here - slope * size
        if fixed > limit:
            return 0
        if slope:
            longest = min(longest, int((limit - fixed) / slope))
    return longest // step * step


def remedy(plan: Plan, current: tuple[int, str] | None = None) -> str:
    """The one setting that makes the run fit, as it is typed.

    current is the stage and checkpointing that did not fit, whatever the plan had said of them:
    only what needs less than they do is a remedy.
    """
    failed = [c for c in plan.choices if (c.stage, c.checkpointing) == current]
    most = failed[0].memory.peak if failed else float("inf")
    fitting = [c for c in plan.choices if c.fits and c.memory.peak < 0.97 * most]
    # One key before two, and what is fastest before what is slow.
    fitting.sort(key=lambda c: (len(_changes(c, current)), c.speed.seconds))
    if fitting:
        return f"set {' '.join(_changes(fitting[0], current))}"
    longest = max(choice.longest for choice in failed or plan.choices)
    step = plan.unit.remedy_step
    shorter = min(longest, plan.size * 3 // 4) // step * step
    if shorter:
        return f"set {plan.unit.key}={shorter}"
    offload = ", or set engine.zero.offload_optimizer=true" if plan.may_offload else ""
    return f"take more ranks{offload}"


def _changes(choice: Choice, current: tuple[int, str] | None) -> list[str]:
    stage, checkpointing = current or (None, None)
    changes = []
    if choice.stage != stage:
        changes.append(f"engine.zero.stage={choice.stage}")
    if choice.checkpointing != checkpointing:
        changes.append(f"engine.checkpointing={choice.checkpointing}")
    return changes


def render_plan(plan: Plan) -> str:
    """A table for people: a line per stage and way of checkpointing, and the chosen one in full."""
    shared = f" on {plan.sequence} ranks each" if plan.sequence > 1 else ""
    lines = [
        f"{plan.parameters / 1e9:.2f} B parameters, {plan.unit.words.format(plan.size)}{shared}, "
        f"{plan.ranks} rank{'s' * (plan.ranks > 1)}, {plan.limit / GIB:.1f} GiB to use",
        "",
        f"{'ZeRO':>4}  {'checkpointing':13}{'peak GiB':>10}{'fits':>6}{plan.unit.longest:>15}"
        f"{'step s':>9}{'MFU':>8}  peak in",
    ]
    for choice in plan.choices:
        mark = "*" if choice is plan.chosen else " "
        lines.append(
            f"{choice.stage:>3}{mark}  {choice.checkpointing:13}{choice.memory.peak / GIB:10.1f}"
            f"{'yes' if choice.fits else 'no':>6}{choice.longest:15,}"
            f"{choice.speed.seconds:9.2f}{choice.speed.mfu:8.1%}  {choice.memory.peak_phase}"
        )
    shown = plan.chosen or min(plan.choices, key=lambda choice: choice.memory.peak)
    lines += ["", plan.why(), ""]
    for phase, parts in shown.memory.phases.items():
        listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size)
        lines.append(f"{phase:>9}  {sum(parts.values()) / GIB:5.1f} GiB = {listed}")
    speed = asdict(shown.speed)
    seconds = ", ".join(
        f"{name} {speed[name]:.3f}" for name in speed if name not in ("flops", "peak_flops")
    )
    lines.append(f"{'step':>9}  {shown.speed.seconds:5.2f} s: {seconds}")
    return "\n".join(lines)


def plan_to_json(plan: Plan) -> str:
    """The same as JSON, sizes in bytes."""
    size, longest = plan.unit.names
    return json.dumps(
        {
            "parameters": plan.parameters,
            size: plan.size,
            "ranks": plan.ranks,
            "limit_bytes": plan.limit,
            "chosen": plan.chosen and [plan.chosen.stage, plan.chosen.checkpointing],
            "why": plan.why(),
            "choices": [
                {
                    "stage": choice.stage,
                    "checkpointing": choice.checkpointing,
                    "peak_bytes": choice.memory.peak,
                    "peak_phase": choice.memory.peak_phase,
                    "phases": choice.memory.phases,
                    "fits": choice.fits,
                    longest: choice.longest,
                    "step_seconds": choice.speed.seconds,
                    "mfu": choice.speed.mfu,
                }
                for choice in plan.choices
            ],
        },
        indent=2,
    )
