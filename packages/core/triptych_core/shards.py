"""Where matrices lie in the flat fp32 masters that DeepSpeed cuts over ranks.

ZeRO-1/2 flatten a whole parameter group and give every rank one equal stretch of it; ZeRO-3 cuts
every parameter by itself and flattens a rank's parts of a sub-group. Both are: a matrix is a run
of elements, and a few ranks hold a stretch of that run each, somewhere in their own flat tensor.
Read in DeepSpeed 0.19.8: stage_1_and_2.py, bf16_optimizer.py, stage3.py, unfused_optimizer.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

Shape = tuple[int, int]
Shapes = Mapping[int, Sequence[Shape]]  # id of a parameter -> the matrices it holds, end to end


@dataclass(frozen=True)
class Piece:
    """The stretch of a matrix that one rank holds: elements begin..end, row by row."""

    rank: int
    begin: int
    end: int
    offset: int  # of the stretch in that rank's flat master


@dataclass(frozen=True, eq=False)
class Matrix:
    """A matrix and who holds what of it."""

    shape: Shape
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Shard:
    """A flat master of this rank, and all matrices that any rank has a piece of in its own."""

    master: Tensor
    matrices: tuple[Matrix, ...]
    group: Any  # the process group the pieces are spread over; None where nothing is cut


@dataclass(frozen=True)
class _Cut:
    """A rank's stretch begin..end of some run of elements, found at `offset` in its master."""

    rank: int
    begin: int
    end: int
    offset: int


def find_shards(optimizer: Any, shapes: Shapes) -> list[Shard]:
    """The masters of DeepSpeed's ZeRO `optimizer` that hold matrices, in the order of its groups.

    Args:
        optimizer: `engine.optimizer`: of ZeRO-1/2/3, or a plain one (ZeRO-0 in fp32).
        shapes: the matrices of each of the model's parameters; others are left out.
    """
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        found = _stage_3(optimizer, shapes)
    elif hasattr(optimizer, "single_partition_of_fp32_groups"):
        found = _stage_1_or_2(
            optimizer.single_partition_of_fp32_groups,
            optimizer.round_robin_bit16_groups,
            optimizer.real_dp_process_group,
            shapes,
            optimizer.round_robin_bit16_offsets,
        )
    elif hasattr(optimizer, "fp32_groups_flat_partition"):
        found = _stage_1_or_2(
            optimizer.fp32_groups_flat_partition,
            optimizer.bf16_groups,
            optimizer.real_dp_process_group,
            shapes,
        )
    else:
        found = _stage_0(optimizer, shapes)
    return [shard for shard in found if shard.matrices]


def _stage_0(optimizer: Any, shapes: Shapes) -> Iterator[Shard]:
    """Whole parameters; in bf16 each has an fp32 copy."""
    halves = getattr(optimizer, "fp16_groups", None)
    if halves is None:
        halves = [group["params"] for group in optimizer.param_groups]
    masters = getattr(optimizer, "fp32_groups", halves)
    for half_group, master_group in zip(halves, masters, strict=True):
        for half, master in zip(half_group, master_group, strict=True):
            whole = [_Cut(rank=0, begin=0, end=half.numel(), offset=0)]
            yield Shard(master, tuple(_cut(shapes.get(id(half), ()), 0, whole)), None)


def _stage_1_or_2(
    masters: Sequence[Tensor],
    groups: Sequence[Sequence[Tensor]],
    process_groups: Sequence[Any],
    shapes: Shapes,
    offsets: Sequence[Sequence[int]] | None = None,
) -> Iterator[Shard]:
    """Parameters end to end, rank r holding elements r * size to (r + 1) * size of the group."""
    for index, (master, group) in enumerate(zip(masters, groups, strict=True)):
        size = master.numel()
        num_ranks = dist.get_world_size(process_groups[index])
        cuts = [_Cut(rank, rank * size, (rank + 1) * size, 0) for rank in range(num_ranks)]
        matrices: list[Matrix] = []
        at = 0
        for number, parameter in enumerate(group):
            begin = at if offsets is None else offsets[index][number]
            matrices += _cut(shapes.get(id(parameter), ()), begin, cuts)
            at = begin + parameter.numel()
        yield Shard(master, tuple(matrices), process_groups[index])


def _stage_3(optimizer: Any, shapes: Shapes) -> Iterator[Shard]:
    """Rank r holds elements r * part to (r + 1) * part of every parameter of a sub-group."""
    for index, master in enumerate(optimizer.fp32_partitioned_groups_flat):
        process_group = optimizer.sub_group_process_groups[index]
        num_ranks = dist.get_world_size(process_group)
        matrices: list[Matrix] = []
        offset = 0
        for parameter in optimizer.fp16_groups[index]:
            part = parameter.partition_numel()  # the last rank's may end in padding
            cuts = [_Cut(rank, rank * part, (rank + 1) * part, offset) for rank in range(num_ranks)]
            matrices += _cut(shapes.get(id(parameter), ()), 0, cuts)
            offset += part
        yield Shard(master, tuple(matrices), process_group)


def _cut(shapes: Sequence[Shape], begin: int, cuts: Sequence[_Cut]) -> Iterator[Matrix]:
    """Matrices that lie end to end from element `begin` of the run that `cuts` divide."""
    for rows, columns in shapes:
        end = begin + rows * columns
        pieces = []
        for cut in cuts:
            left, right = max(begin, cut.begin), min(end, cut.end)
            if left < right:
                offset = cut.offset + left - cut.begin
                pieces.append(Piece(cut.rank, left - begin, right - begin, offset))
        yield Matrix((rows, columns), tuple(pieces))
        begin = end
