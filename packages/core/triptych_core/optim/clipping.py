"""Clipping by the global norm, without asking the device for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def total_norm(gradients: list[Tensor]) -> Tensor:
    """The 2-norm of gradients of any float dtypes together, () fp32."""
    return torch.linalg.vector_norm(
        torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32))
    )


def clip_sets(groups: Iterable[Mapping[str, Any]]) -> dict[str, list[Tensor]]:
    """What is clipped by one norm: parameters of optimizer groups, by the groups' `clip`."""
    found: dict[str, list[Tensor]] = {}
    for group in groups:
        found.setdefault(group.get("clip", ""), []).extend(group["params"])
    return found


def clip_scale(norm: Tensor, max_norm: float) -> Tensor:
    """What gradients of this norm are multiplied by so that it is at most max_norm (0 = any).

    NaN where the norm is not finite: the optimizer then leaves everything as it is.
    """
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0) if max_norm else torch.ones_like(norm)
    return torch.where(norm.isfinite(), scale, torch.nan)
