"""An average before it runs: what is read and written, and the memory it takes."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from triptych_core.averaging.combine import Room
from triptych_core.averaging.layout import Shard, lay_out
from triptych_core.averaging.recipe import Recipe
from triptych_core.averaging.stored import Source

SUMS = {"linear": 1, "slerp": 1, "task-arithmetic": 2, "ties": 4}  # accumulators of a method
# Elements a thread works on: larger ones leave the caches, smaller ones ask the disk too often.
_MOST_ELEMENTS, _LEAST_ELEMENTS = 1 << 20, 1 << 12
# Beside the rooms: Python's objects while it runs, and what torch 2.14 takes when it is torn down,
# 128 MiB measured.
_RESERVE = 192 << 20
_ENDS = 1 << 16


@dataclass(frozen=True)
class Plan:
    """Everything about an average but its numbers."""

    sources: list[Source]
    recipe: Recipe
    shards: list[Shard]

    @property
    def bytes_to_write(self) -> int:
        """Of all shards."""
        return sum(shard.num_bytes for shard in self.shards)

    @cached_property
    def bytes_to_read(self) -> int:
        """Of all tensors that count; a method that passes over files again finds them cached."""
        return sum(
            source.tensors[name].num_bytes
            for name in self.sources[0].tensors
            for source in (self.sources[number] for number in self.inputs_of(name))
        )

    @property
    def reads_once(self) -> bool:
        """Whether each element of the inputs is read once; else the page cache helps."""
        return self.recipe.method in ("linear", "task-arithmetic")

    def inputs_of(self, name: str) -> list[int]:
        """Numbers of the inputs that are read for a tensor."""
        recipe, stored = self.recipe, self.sources[0].tensors[name]
        if not recipe.is_averaged(name, stored):
            return [recipe.copy_from]
        if recipe.method != "linear":
            return list(range(len(self.sources)))
        return [number for number, weight in enumerate(recipe.weights_of(name)) if weight != 0]

    def fingerprint(self) -> str:
        """Of inputs, recipe and layout: a half-written output goes on only under the same."""
        inputs = [
            [str(file), file.stat().st_size, file.stat().st_mtime_ns]
            for source in self.sources
            for file in source.files()
        ]
        layout = [hashlib.sha256(shard.header).hexdigest() for shard in self.shards]
        text = json.dumps([inputs, self.recipe.to_json(), layout])
        return hashlib.sha256(text.encode()).hexdigest()


def make_plan(sources: list[Source], recipe: Recipe, max_shard_bytes: int) -> Plan:
    """Lay the output out."""
    return Plan(sources, recipe, lay_out(sources[0], recipe, max_shard_bytes))


@dataclass(frozen=True)
class Memory:
    """How many threads, with rooms for how many elements each.

    Args:
        threads: that work.
        elements: of a stretch of a file, at most.
        raw_bytes: of an element of the inputs, at most.
        least_bytes: of an element of the output, at least.
        dtype: of accumulation.
        sums: accumulators.
    """

    threads: int
    elements: int
    raw_bytes: int
    least_bytes: int
    dtype: torch.dtype
    sums: int

    @property
    def stretch_bytes(self) -> int:
        """Of a file of the output, whole pages that one thread fills at a time."""
        return self.elements * self.least_bytes

    @property
    def num_bytes(self) -> int:
        """Of all rooms, with what they write from."""
        size = Room.bytes_of(self.elements, self.raw_bytes, self.dtype, self.sums)
        return self.threads * (size + self.stretch_bytes)

    def room(self) -> Room:
        """The memory of a thread."""
        return Room(self.elements, self.raw_bytes, self.dtype, self.sums)


def plan_memory(plan: Plan, max_bytes: int, threads: int) -> Memory:
    """As many threads, and as large stretches, as fit beside what the process holds already.

    Raises:
        ValueError: not even one thread with the smallest stretches does.
    """
    stored = plan.sources[0].tensors.values()
    dtypes = {s.dtype for s in stored}
    raw_bytes = max(dtype.itemsize for dtype in dtypes)
    least_bytes = min(slot.dtype.itemsize for shard in plan.shards for slot in shard.slots)
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    sums = SUMS[plan.recipe.method]
    held = resident_bytes()
    for count in range(threads, 0, -1):
        elements = _MOST_ELEMENTS
        while elements >= _LEAST_ELEMENTS:
            memory = Memory(count, elements, raw_bytes, least_bytes, dtype, sums)
            if held + _RESERVE + memory.num_bytes <= max_bytes:
                # Threads give way before stretches become very small.
                if elements >= 1 << 16 or count == 1:
                    return memory
                break
            elements //= 2
    least = (
        held + _RESERVE + Memory(1, _LEAST_ELEMENTS, raw_bytes, least_bytes, dtype, sums).num_bytes
    )
    raise ValueError(
        f"--max-memory: must be at least {least / 2**20:.0f}M here, most of it Python with torch, "
        f"got {max_bytes / 2**20:.0f}M; allow more"
    )


def resident_bytes() -> int:
    """Memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def describe_inputs(plan: Plan, whole: bool = False) -> list[dict[str, Any]]:
    """The inputs for averaging.json: where, what, and what makes their files recognisable.

    Args:
        plan: of the average.
        whole: the SHA-256 of whole files and not of their two ends, which reads them once more.
    """
    return [
        {
            "path": str(source.path.resolve()),
            "kind": source.kind,
            "step": source.step,
            **source.facts,
            "files": {
                os.path.relpath(file, source.path): describe_file(file, whole)
                for file in source.files()
            },
        }
        for source in plan.sources
    ]


def describe_file(file: Path, whole: bool) -> dict[str, Any]:
    """Size and digest of a file; its ends hold what safetensors and zip say of the rest."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        if whole:
            return {"bytes": size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}
        ends = opened.read(_ENDS)
        opened.seek(max(0, size - _ENDS))
        ends += opened.read(_ENDS)
    return {"bytes": size, "sha256_of_ends": hashlib.sha256(ends).hexdigest()}
