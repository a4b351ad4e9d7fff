"""Where each tensor of the output will lie, known before the first byte is read."""

from __future__ import annotations

import json
from typing import NamedTuple

import torch

from triptych_core.averaging.recipe import Recipe
from triptych_core.averaging.stored import NAMES_OF_DTYPES, Source


class Slot(NamedTuple):
    """A tensor's place in a shard, in bytes from the shard's start."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class Shard(NamedTuple):
    """A file of the output: its header and its tensors, in the order of their bytes."""

    file: str
    header: bytes
    slots: tuple[Slot, ...]

    @property
    def num_bytes(self) -> int:
        """Of the file."""
        return len(self.header) + sum(slot.num_bytes for slot in self.slots)


def lay_out(source: Source, recipe: Recipe, max_shard_bytes: int) -> list[Shard]:
    """Shards of at most `max_shard_bytes` of tensors, those of the first input in its order.

    A tensor that is larger has a shard of its own.
    """
    groups: list[list[tuple[str, torch.dtype, tuple[int, ...], int]]] = [[]]
    held = 0
    for name, stored in source.tensors.items():
        dtype = recipe.output_dtype(name, stored)
        size = stored.size * dtype.itemsize
        if groups[-1] and held + size > max_shard_bytes:
            groups.append([])
            held = 0
        groups[-1].append((name, dtype, stored.shape, size))
        held += size
    return [_shard(group, number, len(groups)) for number, group in enumerate(groups, 1)]


def index_of(shards: list[Shard]) -> bytes:
    """model.safetensors.index.json."""
    total = sum(slot.num_bytes for shard in shards for slot in shard.slots)
    weight_map = {slot.name: shard.file for shard in shards for slot in shard.slots}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return (json.dumps(index, indent=2) + "\n").encode()


def _shard(
    group: list[tuple[str, torch.dtype, tuple[int, ...], int]], number: int, count: int
) -> Shard:
    file = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
    # Widest elements first: each tensor then begins at a multiple of its own elements.
    group = sorted(group, key=lambda entry: -entry[1].itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers wants it
    at = 0
    for name, dtype, shape, size in group:
        header[name] = {
            "dtype": NAMES_OF_DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [at, at := at + size],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    start = len(text).to_bytes(8, "little") + text
    slots, at = [], len(start)
    for name, dtype, shape, size in group:
        slots.append(Slot(name, dtype, shape, at, size))
        at += size
    return Shard(file, start, tuple(slots))
