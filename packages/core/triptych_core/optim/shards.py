"""Where parameters, and matrices in them, lie in the flat fp32 masters that ZeRO cuts.

DeepSpeed's ZeRO-1/2 flatten a whole parameter group and give every rank one equal stretch of it,
ours do so bucket by bucket; ZeRO-3 cuts every parameter by itself and flattens a rank's parts of a
sub-group. All are: a parameter is a run of elements, and a few ranks hold a stretch of that run
each, somewhere in their own flat tensor.
Read in DeepSpeed 0.19.8: stage_1_and_2.py, bf16_optimizer.py, stage3.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

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


@dataclass(frozen=True, eq=False)
class _Run:
    """A parameter, from element `begin` on in a run that `cuts` divide."""

    parameter: Tensor
    begin: int
    cuts: tuple[_Cut, ...]


@dataclass(frozen=True, eq=False)
class Flat:
    """A flat master of this rank, and all parameters that any rank has a piece of in its own."""

    master: Tensor
    runs: tuple[_Run, ...]
    group: Any  # the process group the runs are cut over; None where nothing is cut

    def shard(self, shapes: Shapes) -> Shard:
        """The matrices in it; parameters without any are left out."""
        found = (_cut(shapes.get(id(run.parameter), ()), run.begin, run.cuts) for run in self.runs)
        return Shard(self.master, tuple(matrix for part in found for matrix in part), self.group)

    def pieces(self) -> Iterator[tuple[Tensor, Piece]]:
        """The parameters of which this rank holds a piece, and which."""
        rank = 0 if self.group is None else dist.get_rank(self.group)
        for run in self.runs:
            numel = getattr(run.parameter, "ds_numel", run.parameter.numel())
            (whole,) = _cut([(1, numel)], run.begin, run.cuts)
            for piece in whole.pieces:
                if piece.rank == rank:
                    yield run.parameter, piece


def find_shards(flats: Iterable[Flat], shapes: Shapes) -> list[Shard]:
    """Of an engine's masters those that hold matrices, in their order.

    Args:
        flats: all masters of this rank.
        shapes: the matrices of each of the model's parameters; others are left out.
    """
    return [shard for flat in flats if (shard := flat.shard(shapes)).matrices]


def flat_masters(optimizer: Any) -> Iterator[Flat]:
    """The masters of DeepSpeed's ZeRO `optimizer` (ZeRO-1, 2 or 3), in the order of its groups."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return _stage_3(optimizer)
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        return _stage_1_or_2(
            optimizer.single_partition_of_fp32_groups,
            optimizer.round_robin_bit16_groups,
            optimizer.real_dp_process_group,
            optimizer.round_robin_bit16_offsets,
        )
    if hasattr(optimizer, "fp32_groups_flat_partition"):
        return _stage_1_or_2(
            optimizer.fp32_groups_flat_partition,
            optimizer.bf16_groups,
            optimizer.real_dp_process_group,
        )
    raise AssertionError(f"{type(optimizer).__name__} is no optimizer of ZeRO-1, 2 or 3")


def whole_masters(masters: Mapping[nn.Parameter, Tensor]) -> Iterator[Flat]:
    """A master for each parameter, whole."""
    for parameter, master in masters.items():
        whole = _Cut(rank=0, begin=0, end=master.numel(), offset=0)
        yield Flat(master, (_Run(parameter, 0, (whole,)),), None)


def even_flat(master: Tensor, begins: Mapping[Any, int], group: Any) -> Flat:
    """A master that is this rank's part of a run which the ranks of `group` cut evenly.

    `begins` says where in the run each parameter begins.
    """
    size = master.numel()
    ranks = range(dist.get_world_size(group))
    cuts = tuple(_Cut(rank, rank * size, (rank + 1) * size, 0) for rank in ranks)
    return Flat(master, tuple(_Run(p, begin, cuts) for p, begin in begins.items()), group)


def _stage_1_or_2(
    masters: Sequence[Tensor],
    groups: Sequence[Sequence[Tensor]],
    process_groups: Sequence[Any],
    offsets: Sequence[Sequence[int]] | None = None,
) -> Iterator[Flat]:
    """Parameters end to end, rank r holding elements r * size to (r + 1) * size of the group."""
    for index, (master, group) in enumerate(zip(masters, groups, strict=True)):
        begins, at = {}, 0
        for number, parameter in enumerate(group):
            begins[parameter] = at if offsets is None else offsets[index][number]
            at = begins[parameter] + parameter.numel()
        yield even_flat(master, begins, process_groups[index])


def _stage_3(optimizer: Any) -> Iterator[Flat]:
    """Rank r holds elements r * part to (r + 1) * part of every parameter of a sub-group."""
    for index, master in enumerate(optimizer.fp32_partitioned_groups_flat):
        process_group = optimizer.sub_group_process_groups[index]
        num_ranks = dist.get_world_size(process_group)
        runs: list[_Run] = []
        offset = 0
        for parameter in optimizer.fp16_groups[index]:
            part = parameter.partition_numel()  # the last rank's may end in padding
            cuts = (_Cut(rank, rank * part, (rank + 1) * part, offset) for rank in range(num_ranks))
            runs.append(_Run(parameter, 0, tuple(cuts)))
            offset += part
        yield Flat(master, tuple(runs), process_group)


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
