"""Stacked experts as checkpoints hold them (the hub's layout): one by one, gate and up apart, or
all in one tensor of transposed matrices.

Directories that hold them stacked, under the model's own names, are read too. In an ExpertGroup a
rank reads its own experts alone, and writing brings them together.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _resolve_process_group

from .experts import ExpertGroup, Experts, Router

ShapeOf = Callable[[str], Sequence[int]]


def stored_names(module: nn.Module, name: str, stored: Collection[str]) -> list[str]:
    """The tensors of a directory that make up a parameter of a module, over all ranks."""
    name = _in_directory(module, name)
    if not isinstance(module, Experts) or module.stored.is_stacked or name in stored:
        return [name]
    return [each for i in range(module.num_experts) for each in _of_expert(module, name, i)]


def stored_pieces(
    module: nn.Module,
    name: str,
    parameter: Tensor,
    stored: Collection[str],
    shape_of: ShapeOf,
) -> Iterator[tuple[str, slice, Tensor]]:
    """What this rank reads of a parameter: a stored tensor, which of its rows, and where to.

    shape_of says a stored tensor's shape.
    """
    name = _in_directory(module, name)
    if not isinstance(module, Experts):
        yield name, slice(None), parameter
    elif name in stored:
        place = parameter.mT if _is_transposed(module, name, shape_of) else parameter
        yield name, slice(module.here.start, module.here.stop), place
    else:
        for expert, matrix in zip(module.here, parameter, strict=True):
            for each, part in _halves(module, name, expert, matrix):
                yield each, slice(None), part


def tensors_to_store(
    module: nn.Module, own: dict[str, nn.Parameter]
) -> Iterator[tuple[str, Tensor]]:
    """A module's tensors under the names of a directory; all ranks of a group must go through."""
    for name, parameter in own.items():
        name = _in_directory(module, name)
        if not isinstance(module, Experts):
            yield name, parameter.detach()
        elif module.stored.is_stacked:
            whole = torch.cat(_from_all(parameter.detach(), module.group))
            squares = has_squares(module.hidden_size, module.width)
            yield name, whole.mT if module.stored.is_transposed and not squares else whole
        else:
            for index, matrix in enumerate(parameter.detach()):
                for rank, theirs in enumerate(_from_all(matrix, module.group)):
                    expert = rank * len(parameter) + index
                    yield from _halves(module, name, expert, theirs)


def router_biases(model: nn.Module) -> dict[str, Tensor]:
    """The biases (E,) fp32 by which experts are chosen, under their names in a directory."""
    return {
        f"{_in_directory(module, prefix)}.e_score_correction_bias": module.e_score_correction_bias
        for prefix, module in model.named_modules()
        if isinstance(module, Router) and module.e_score_correction_bias is not None
    }


def draw_experts(module: Experts, parameter: Tensor, std: float, seed: torch.Generator) -> Tensor:
    """normal(0, std) for all experts one after the other, of which this rank's are kept."""
    kept = []
    for expert in range(module.num_experts):
        matrix = torch.normal(0.0, std, parameter.shape[1:], generator=seed, device="cpu")
        if expert in module.here:
            kept.append(matrix)
    return torch.stack(kept)


def has_squares(hidden_size: int, width: int) -> bool:
    """Whether transformers 5 would not see that a stack is transposed: it goes by the shape."""
    return hidden_size in (width, 2 * width)


def _in_directory(module: nn.Module, name: str) -> str:
    if isinstance(module, Experts | Router):
        return name.replace(".mlp.", f".{module.stored.block}.")
    return name


def _of_expert(module: Experts, name: str, expert: int) -> list[str]:
    prefix, _, stack = name.rpartition(".")
    stored = module.stored
    halves = {"gate_up_proj": (stored.gate, stored.up), "down_proj": (stored.down,)}[stack]
    return [f"{prefix}.{expert}.{half}.weight" for half in halves]


def _halves(
    module: Experts, name: str, expert: int, matrix: Tensor
) -> Iterator[tuple[str, Tensor]]:
    names = _of_expert(module, name, expert)
    yield from zip(names, matrix.chunk(len(names)), strict=True)


def _is_transposed(module: Experts, name: str, shape_of: ShapeOf) -> bool:
    """Whether a layer's stacks hold transposed matrices; one that is not square tells."""
    prefix = name.rpartition(".")[0]
    shapes = {"gate_up_proj": (2 * module.width, module.hidden_size)}
    shapes["down_proj"] = (module.hidden_size, module.width)
    return any(
        rows != columns and tuple(shape_of(f"{prefix}.{stack}"))[1:] == (columns, rows)
        for stack, (rows, columns) in shapes.items()
    )


def _from_all(tensor: Tensor, group: ExpertGroup) -> list[Tensor]:
    """A tensor from each rank of the group, in its order."""
    if group.size == 1:
        return [tensor]
    found = [torch.empty_like(tensor) for _ in range(group.size)]
    process_group = _resolve_process_group(cast("dist.GroupName", group.name))
    dist.all_gather(found, tensor.contiguous(), group=process_group)
    return found
