"""Parameter groups and the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from triptych_core.config import OptimConfig, did_you_mean


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    config: OptimConfig,
    part_of: Callable[[str], str],
) -> list[dict[str, Any]]:
    """Split trainable parameters by part and by whether they decay.

    Vectors (norm weights, biases) never decay; matrices do. A group carries `name`
    (`<part>/decay` or `<part>/no_decay`), `lr` and `peak_lr`, from which each step's rate is set.

    Args:
        named_parameters: names and parameters, possibly partitioned by ZeRO-3.
        config: rates; `lr_by_part` overrides `lr` for a part.
        part_of: name of a parameter -> its part, e.g. "vision".

    Raises:
        ValueError: `lr_by_part` names a part that has no trainable parameter.
    """
    groups: dict[str, dict[str, Any]] = {}
    parts: set[str] = set()
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        part = part_of(name)
        parts.add(part)
        # Under ZeRO-3 a parameter is an empty shard outside its module: ask for the whole shape.
        shape = getattr(parameter, "ds_shape", parameter.shape)
        decays = len(shape) >= 2
        lr = config.lr_by_part.get(part, config.lr)
        group = groups.setdefault(
            f"{part}/{'decay' if decays else 'no_decay'}",
            {"params": [], "lr": lr, "weight_decay": config.weight_decay if decays else 0.0},
        )
        group["params"].append(parameter)
    for part in config.lr_by_part:
        if part not in parts:
            near = did_you_mean(part, sorted(parts))
            raise ValueError(f"optim.lr_by_part: must name a part that trains, got '{part}'{near}")
    return [{**group, "name": name, "peak_lr": group["lr"]} for name, group in groups.items()]


def build_adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW (decoupled weight decay, arXiv 1711.05101) over parameter groups."""
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )


def set_learning_rate(optimizer: Any, scale: float) -> None:
    """Set every group's rate to its own peak times `scale`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * scale
