"""Stacked experts as checkpoints hold them: expert by expert, gate and up apart (the hub's layout).

Directories that hold them stacked, under the model's own names, are read too. In an ExpertGroup a
rank reads its own experts alone, and writing brings them together one by one.
"""

from collections.abc import Collection, Iterator
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _resolve_process_group

from .experts import ExpertGroup, Experts

_HALVES = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def stored_names(module: nn.Module, name: str, stored: Collection[str]) -> list[str]:
    """The tensors of a directory that make up a parameter of a module, over all ranks."""
    if not isinstance(module, Experts) or name in stored:
        return [name]
    return [each for expert in range(module.num_experts) for each in _of_expert(name, expert)]


def stored_pieces(
    module: nn.Module, name: str, parameter: Tensor, stored: Collection[str]
) -> Iterator[tuple[str, slice, Tensor]]:
    """What this rank reads of a parameter: a stored tensor, which of its rows, and where to."""
    if not isinstance(module, Experts):
        yield name, slice(None), parameter
    elif name in stored:
        yield name, slice(module.here.start, module.here.stop), parameter
    else:
        for expert, matrix in zip(module.here, parameter, strict=True):
            for each, part in _halves(name, expert, matrix):
                yield each, slice(None), part


def tensors_to_store(
    module: nn.Module, own: dict[str, nn.Parameter]
) -> Iterator[tuple[str, Tensor]]:
    """A module's tensors under the names of a directory; all ranks of a group must go through."""
    for name, parameter in own.items():
        if not isinstance(module, Experts):
            yield name, parameter.detach()
            continue
        for index, matrix in enumerate(parameter.detach()):
            for rank, theirs in enumerate(_from_all(matrix, module.group)):
                expert = rank * len(parameter) + index
                yield from _halves(name, expert, theirs)


def draw_experts(module: Experts, parameter: Tensor, std: float, seed: torch.Generator) -> Tensor:
    """normal(0, std) for all experts one after the other, of which this rank's are kept."""
    kept = []
    for expert in range(module.num_experts):
        matrix = torch.normal(0.0, std, parameter.shape[1:], generator=seed, device="cpu")
        if expert in module.here:
            kept.append(matrix)
    return torch.stack(kept)


def _of_expert(name: str, expert: int) -> list[str]:
    prefix, _, stack = name.rpartition(".")
    return [f"{prefix}.{expert}.{half}.weight" for half in _HALVES[stack]]


def _halves(name: str, expert: int, matrix: Tensor) -> Iterator[tuple[str, Tensor]]:
    names = _of_expert(name, expert)
    yield from zip(names, matrix.chunk(len(names)), strict=True)


def _from_all(matrix: Tensor, group: ExpertGroup) -> list[Tensor]:
    """A matrix from each rank of the group, in its order."""
    if group.size == 1:
        return [matrix]
    found = [torch.empty_like(matrix) for _ in range(group.size)]
    process_group = _resolve_process_group(cast("dist.GroupName", group.name))
    dist.all_gather(found, matrix.contiguous(), group=process_group)
    return found
