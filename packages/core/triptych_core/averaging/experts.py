"""Stacked experts under the names that a directory on the hub has: expert by expert."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from triptych_core.averaging.stored import Stored

# Stacks (experts, rows, columns), and the matrices that lie one below the other in an expert.
_HALVES = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


class Apart(NamedTuple):
    """How directories name a sparse block, and the matrices of an expert, where others do not."""

    block: str = "mlp"
    halves: Mapping[str, str] = {}


# Families, by model_type, whose directories have a matrix an expert.
APART = {
    "dots1": Apart(),
    "mixtral": Apart("block_sparse_moe", {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}),
    "qwen2_moe": Apart(),
    "qwen3_moe": Apart(),
}


def is_stack(name: str) -> bool:
    """Whether a tensor of this name holds all experts of a layer."""
    prefix, _, stack = name.rpartition(".")
    return prefix.endswith(".experts") and stack in _HALVES


def in_directory(name: str, names: Apart) -> str:
    """A router's or a stack's name with the block as directories name it."""
    if is_stack(name) or ".mlp.gate." in name:
        return name.replace(".mlp.", f".{names.block}.")
    return name


def expert_by_expert(
    name: str, stored: Stored, names: Apart = APART["qwen3_moe"]
) -> Iterator[tuple[str, Stored]]:
    """A stack as a matrix an expert, gate and up apart: `layers.0.mlp.experts.3.up_proj.weight`."""
    prefix, _, stack = in_directory(name, names).rpartition(".")
    halves = _HALVES[stack]
    experts, rows, columns = stored.shape
    shape = (rows // len(halves), columns)
    size = math.prod(shape)
    for number in range(experts * len(halves)):
        expert, half = divmod(number, len(halves))
        part = stored.part(number * size, (number + 1) * size, shape)
        matrix = names.halves.get(halves[half], halves[half])
        yield f"{prefix}.{expert}.{matrix}.weight", part


def stack_shape(name: str, tensors: Mapping[str, Stored]) -> tuple[int, ...] | None:
    """The shape of a stack, of its matrices among `tensors`; None if they are not there."""
    prefix, _, stack = name.rpartition(".")
    halves = _HALVES[stack]
    first = tensors.get(f"{prefix}.0.{halves[0]}.weight")
    if first is None:
        return None
    tail = f".{halves[0]}.weight"
    experts = sum(key.startswith(f"{prefix}.") and key.endswith(tail) for key in tensors)
    return (experts, first.shape[0] * len(halves), first.shape[1])
