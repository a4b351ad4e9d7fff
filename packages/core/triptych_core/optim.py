"""Parameter groups and the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from triptych_core.config import OptimConfig, did_you_mean
from triptych_core.muon import Muon
from triptych_core.shards import Shape


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
    newton_schulz: Callable[[Tensor, int], Tensor] | None = None,
) -> torch.optim.AdamW:
    """The optimizer of `optim.name` over parameter groups, fused AdamW in both cases.

    Args:
        groups: of `parameter_groups`.
        config: what the groups do not hold themselves.
        newton_schulz: stack of matrices (B, M, N) and number of steps -> their orthogonal factors.
    """
    if config.name == "adamw":
        return build_adamw(groups, config)
    assert newton_schulz is not None, "optim.name=muon needs newton_schulz"
    steps = config.muon.ns_steps
    return Muon(groups, lambda stack: newton_schulz(stack, steps), **_adamw_options(config))


def build_adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW (decoupled weight decay, arXiv 1711.05101) over parameter groups."""
    return torch.optim.AdamW(groups, fused=True, **_adamw_options(config))


def _adamw_options(config: OptimConfig) -> dict[str, Any]:
    return {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}


def set_learning_rate(optimizer: Any, scale: float) -> None:
    """Set every group's rate to its own peak times `scale`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * scale
