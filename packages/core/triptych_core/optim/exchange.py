"""Matrices that are cut over ranks, made whole on one of them each, and given back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from triptych_core.optim.shards import Matrix, Piece, Shape, Shard

# Elements per rank in one exchange: 256 MiB in fp32, for what is sent and again for what comes.
MAX_ELEMENTS = 1 << 26

_Row = list[tuple[Matrix, Piece]]  # what one rank sends to another


@dataclass(frozen=True)
class Exchange:
    """A batch of matrices, each with the rank that works on it whole.

    Every rank holds the same list, so each knows what the others send without asking.
    """

    matrices: tuple[Matrix, ...]
    owners: tuple[int, ...]
    group: Any
    rank: int

    def apply(self, flat: Tensor, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every matrix in the ranks' `flat` (n,) by `function` of it, in place.

        `function` takes (B, M, N), a stack of matrices of one shape. A collective call, unless no
        matrix is cut.
        """
        if self.is_whole:
            work_on(self.own_matrices(flat), function)
            return
        mine = self._mine()
        num_ranks = dist.get_world_size(self.group)
        going = [self._pieces(self.rank, owner) for owner in range(num_ranks)]
        coming = [self._pieces(source, self.rank) for source in range(num_ranks)]
        held = [_stretch(flat, piece) for row in going for _, piece in row]
        received = self._swap(torch.cat([flat[:0], *held]), going, coming)
        whole = torch.empty_like(received)
        starts = dict(zip(mine, _starts(mine), strict=True))
        places = [_stretch(whole, p, starts[m] + p.begin) for row in coming for m, p in row]
        _spread(received, places)
        work_on([_matrix(whole, matrix, start) for matrix, start in starts.items()], function)
        _spread(self._swap(torch.cat([flat[:0], *places]), coming, going), held)

    @property
    def is_whole(self) -> bool:
        """Whether no matrix is cut, so that `apply` needs no other rank."""
        return all(len(matrix.pieces) == 1 for matrix in self.matrices)

    def own_matrices(self, flat: Tensor) -> list[Tensor]:
        """Views (M, N) into `flat` of this rank's matrices, where none is cut."""
        return [_matrix(flat, matrix, matrix.pieces[0].offset) for matrix in self._mine()]

    def _mine(self) -> list[Matrix]:
        return [matrix for matrix, owner in self._owned() if owner == self.rank]

    def _owned(self) -> Iterator[tuple[Matrix, int]]:
        return zip(self.matrices, self.owners, strict=True)

    def _pieces(self, source: int, owner: int) -> _Row:
        """What `source` holds of the matrices of `owner`, in the order of both their buffers."""
        return [
            (matrix, piece)
            for matrix, its_owner in self._owned()
            if its_owner == owner
            for piece in matrix.pieces
            if piece.rank == source
        ]

    def _swap(self, given: Tensor, going: Sequence[_Row], coming: Sequence[_Row]) -> Tensor:
        """Send each rank its row's pieces of `given`; returns what came, in the order of ranks."""
        came_counts, given_counts = (
            [sum(piece.end - piece.begin for _, piece in row) for row in rows]
            for rows in (coming, going)
        )
        came = given.new_empty(sum(came_counts))
        dist.all_to_all_single(came, given, came_counts, given_counts, group=self.group)
        return came


def plan_exchanges(shard: Shard, max_elements: int = MAX_ELEMENTS) -> list[Exchange]:
    """Who works on which matrix of a shard, in batches of equal shapes as far as possible.

    A matrix goes to the least loaded of the ranks that hold the most of it: under ZeRO-1/2 nearly
    all matrices stay where they are, under ZeRO-3 the work is dealt out evenly.
    """
    rank = 0 if shard.group is None else dist.get_rank(shard.group)
    num_ranks = 1 if shard.group is None else dist.get_world_size(shard.group)
    load = [0.0] * num_ranks
    whole = [matrix for matrix in shard.matrices if len(matrix.pieces) == 1]
    cut = sorted(
        (matrix for matrix in shard.matrices if len(matrix.pieces) > 1),
        key=lambda matrix: (_cost(matrix.shape), matrix.shape),
        reverse=True,
    )
    exchanges = []
    if whole:
        owners = tuple(matrix.pieces[0].rank for matrix in whole)
        for matrix, owner in zip(whole, owners, strict=True):
            load[owner] += _cost(matrix.shape)
        exchanges.append(Exchange(tuple(whole), owners, shard.group, rank))
    for batch in _batches(cut, max_elements * num_ranks):
        owners = tuple(_choose(matrix, load) for matrix in batch)
        exchanges.append(Exchange(tuple(batch), owners, shard.group, rank))
    return exchanges


def _choose(matrix: Matrix, load: list[float]) -> int:
    most = max(piece.end - piece.begin for piece in matrix.pieces)
    # At least half of the most: under ZeRO-3 the last rank's piece may be short of a few elements.
    holders = [piece.rank for piece in matrix.pieces if 2 * (piece.end - piece.begin) >= most]
    owner = min(holders, key=lambda rank: (load[rank], rank))
    load[owner] += _cost(matrix.shape)
    return owner


def _batches(matrices: Sequence[Matrix], max_elements: int) -> Iterator[list[Matrix]]:
    batch: list[Matrix] = []
    size = 0
    for matrix in matrices:
        if batch and size + _numel(matrix.shape) > max_elements:
            yield batch
            batch, size = [], 0
        batch.append(matrix)
        size += _numel(matrix.shape)
    if batch:
        yield batch


def work_on(matrices: Sequence[Tensor], function: Callable[[Tensor], Tensor]) -> None:
    """Replace (M, N) matrices by `function` of stacks (B, M, N) of them, shape by shape."""
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for matrix in matrices:
        by_shape.setdefault(matrix.shape, []).append(matrix)
    for shape, parts in by_shape.items():
        size = max(1, MAX_ELEMENTS // shape.numel())
        for begin in range(0, len(parts), size):
            some = parts[begin : begin + size]
            torch._foreach_copy_(some, list(function(torch.stack(some)).unbind()))


def _matrix(flat: Tensor, matrix: Matrix, start: int) -> Tensor:
    return flat[start : start + _numel(matrix.shape)].view(matrix.shape)


def _spread(flat: Tensor, places: Sequence[Tensor]) -> None:
    """Copy `flat`, cut to their lengths, into `places`."""
    if places:
        torch._foreach_copy_(list(places), list(flat.split([len(place) for place in places])))


def _stretch(flat: Tensor, piece: Piece, start: int | None = None) -> Tensor:
    """A piece's elements, at its place in its holder's master or from element `start` on."""
    start = piece.offset if start is None else start
    return flat[start : start + piece.end - piece.begin]


def _starts(matrices: Sequence[Matrix]) -> list[int]:
    starts, at = [], 0
    for matrix in matrices:
        starts.append(at)
        at += _numel(matrix.shape)
    return starts


def _numel(shape: Shape) -> int:
    return shape[0] * shape[1]


def _cost(shape: Shape) -> float:
    """Of Newton-Schulz, up to a factor: products along the longer side by the shorter squared."""
    return float(_numel(shape) * min(shape))
