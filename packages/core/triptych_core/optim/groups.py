"""Parameter groups and the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from triptych_core.config import OptimConfig, ScheduleConfig, did_you_mean
from triptych_core.optim.adamw import AdamW
from triptych_core.optim.ema import Ema
from triptych_core.optim.muon import Muon
from triptych_core.optim.schedule import lr_scale
from triptych_core.optim.shards import Shape
from triptych_kernels import newton_schulz


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    config: OptimConfig,
    part_of: Callable[[str], str],
    matrices: Mapping[str, Sequence[Shape]] | None = None,
) -> list[dict[str, Any]]:
    """Split trainable parameters by part, by who trains them and by whether they decay.

    Vectors (norm weights, biases) never decay; matrices do. A group carries `name`
    (`<part>/muon`, `<part>/decay` or `<part>/no_decay`), `lr` and `peak_lr`, from which each step's
    rate is set; one of Muon's also `rule`, its options, and `matrices`.

    Args:
        named_parameters: names and parameters, possibly partitioned by ZeRO-3.
        config: rates; `lr_by_part` overrides `lr` for a part.
        part_of: name of a parameter -> its part, e.g. "vision".
        matrices: the shapes of the matrices in each parameter that Muon may train, by its name.

    Raises:
        ValueError: `lr_by_part` names a part that has no trainable parameter.
    """
    by_muon = matrices or {} if config.name == "muon" else {}
    groups: dict[str, dict[str, Any]] = {}
    parts: set[str] = set()
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        part = part_of(name)
        parts.add(part)
        # Under ZeRO-3 a parameter is an empty shard outside its module: ask for the whole shape.
        decays = len(getattr(parameter, "ds_shape", parameter.shape)) >= 2
        kind = "muon" if name in by_muon else "decay" if decays else "no_decay"
        group = groups.setdefault(f"{part}/{kind}", _new_group(config, part, kind))
        group["params"].append(parameter)
        if kind == "muon":
            group["matrices"].append(by_muon[name])
    for part in config.lr_by_part:
        if part not in parts:
            near = did_you_mean(part, sorted(parts))
            raise ValueError(f"optim.lr_by_part: must name a part that trains, got '{part}'{near}")
    return [{**group, "name": name, "peak_lr": group["lr"]} for name, group in groups.items()]


def _new_group(config: OptimConfig, part: str, kind: str) -> dict[str, Any]:
    lr = config.lr_by_part.get(part, config.lr)
    decay = 0.0 if kind == "no_decay" else config.weight_decay
    group: dict[str, Any] = {"params": [], "lr": lr, "weight_decay": decay}
    if kind == "muon":
        muon = config.muon
        group["lr"] = lr if muon.lr is None else lr / config.lr * muon.lr
        group |= {"rule": "muon", "momentum": muon.momentum, "nesterov": muon.nesterov}
        group |= {"lr_scale": muon.lr_scale, "matrices": []}
    return group


def build_optimizer(
    groups: list[dict[str, Any]],
    config: OptimConfig,
    *,
    seed: int = 0,
    orthogonalise: Callable[[Tensor, int], Tensor] = newton_schulz,
) -> AdamW:
    """The optimizer of `optim.name` over parameter groups.

    Args:
        groups: of `parameter_groups`.
        config: what the groups do not hold themselves.
        seed: of the rounding of bf16 states, alike on all ranks.
        orthogonalise: for Muon, a stack of matrices (B, M, N) and the number of steps -> their
            orthogonal factors.
    """
    options: dict[str, Any] = {
        "lr": config.lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "state_dtype": config.state_dtype,
        "seed": seed,
        "ema": None if config.ema_decay is None else Ema(config.ema_decay, config.ema_warmup),
    }
    if config.name == "adamw":
        return AdamW(groups, **options)
    steps = config.muon.ns_steps
    return Muon(groups, lambda stack: orthogonalise(stack, steps), **options)


def set_learning_rate(optimizer: Any, schedule: ScheduleConfig, step: int, num_steps: int) -> None:
    """Set every group's rate for a step in 1..num_steps: its own peak times the schedule's factor.

    A group with `first_step` rests before that step, and its schedule begins with it.
    """
    for group in optimizer.param_groups:
        late = group.get("first_step", 1) - 1
        group["rests"] = step <= late
        scale = 0.0 if group["rests"] else lr_scale(schedule, step - late, num_steps - late)
        group["lr"] = group["peak_lr"] * scale
