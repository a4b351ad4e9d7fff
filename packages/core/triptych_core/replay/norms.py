"""Gradient norms of a step, module by module, whatever the engine has divided."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from torch import Tensor

from triptych_core.engine.light import LightEngine
from triptych_core.parallel.tensor import is_cut, tensor_place


def gradient_norms(engine: Any) -> dict[str, Tensor]:
    """The 2-norm of each parameter's gradient over all ranks, () fp32, before clipping.

    After a step's last backward and before its update; every rank takes part.
    """
    whole = engine.gradients() if isinstance(engine, LightEngine) else None
    norms, holders, cut = {}, {}, {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        found: Any = safe_get_full_grad(parameter) if whole is None else whole[parameter]
        norms[name] = torch.linalg.vector_norm(found.detach().float())
        if hasattr(parameter, "expert_groups"):
            holders[name] = parameter.expert_groups[1]
        elif is_cut(parameter):
            cut[name] = engine.mpu.get_tensor_model_parallel_group()
    if holders or tensor_place(engine)[1] > 1:
        _add_parts(norms, holders)
        _add_parts(norms, cut)
    return norms


def by_module(norms: Mapping[str, float], layers: Iterable[str]) -> dict[str, float]:
    """Norms of layers as wholes, and of the modules beside them, in the order of the model."""
    squares: dict[str, float] = {}
    prefixes = sorted(layers, key=len, reverse=True)
    for name, norm in norms.items():
        module = next((p for p in prefixes if name.startswith(f"{p}.")), name.rpartition(".")[0])
        squares[module] = squares.get(module, 0.0) + norm * norm
    return {name: square**0.5 for name, square in squares.items()}


def _add_parts(norms: dict[str, Tensor], groups: Mapping[str, Any]) -> None:
    """Put together the norms of what the ranks of a group have parts of."""
    if groups:
        squares = torch.stack([norms[name] for name in groups]).square()
        dist.all_reduce(squares, group=next(iter(groups.values())))
        norms |= dict(zip(groups, squares.sqrt(), strict=True))
