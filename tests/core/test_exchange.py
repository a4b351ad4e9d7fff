"""Matrices cut over ranks come together whole on one rank each, and go back where they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.ranks import run_ranks

SHAPES = [(3, 5), (7, 2), (3, 5), (1, 1), (4, 4), (3, 5), (9, 8), (2, 7)]


def run_of_matrices() -> Tensor:
    total = sum(rows * columns for rows, columns in SHAPES)
    return torch.randn(total, generator=torch.Generator().manual_seed(3))


def work(stack: Tensor) -> Tensor:
    """Depends on every element and on where it stands in its matrix."""
    return stack.flip(-1) * stack.sum((-2, -1), keepdim=True) + torch.arange(stack.shape[-1])


def wanted() -> Tensor:
    sizes = [rows * columns for rows, columns in SHAPES]
    parts = zip(run_of_matrices().split(sizes), SHAPES, strict=True)
    return torch.cat([work(part.view(1, *shape)).flatten() for part, shape in parts])


def exchanged(style: str, max_elements: int) -> tuple[Tensor, Tensor, list[Any], list[int]]:
    """This rank's stretch after the exchange, what it should be, the plan, and its own work."""
    from triptych_core.optim.exchange import plan_exchanges
    from triptych_core.optim.shards import Shard, _Cut, _cut

    rank, world_size = dist.get_rank(), dist.get_world_size()
    run, target = run_of_matrices(), wanted()
    part = -(-len(run) // world_size)
    matrices: list[Any] = []
    pieces: list[tuple[Tensor, Tensor]] = []
    if style == "flattened":  # as ZeRO-1/2
        cuts = [_Cut(r, r * part, (r + 1) * part, 0) for r in range(world_size)]
        matrices = list(_cut(SHAPES, 0, cuts))
        pieces = [(x[rank * part : (rank + 1) * part] for x in (run, target))]
    else:  # each matrix by itself, as ZeRO-3
        begin, offset = 0, 0
        for rows, columns in SHAPES:
            size, share = rows * columns, -(-rows * columns // world_size)
            cuts = [_Cut(r, r * share, (r + 1) * share, offset) for r in range(world_size)]
            matrices += _cut([(rows, columns)], 0, cuts)
            ends = min(rank * share, size), min((rank + 1) * share, size)
            padding = torch.zeros(share - (ends[1] - ends[0]))
            pieces.append(
                tuple(
                    torch.cat([x[begin + ends[0] : begin + ends[1]], padding])
                    for x in (run, target)
                )
            )
            begin, offset = begin + size, offset + share
    flat, result = (torch.cat(list(column)) for column in zip(*pieces, strict=True))
    plan = plan_exchanges(Shard(flat, tuple(matrices), dist.group.WORLD), max_elements)
    worked: list[int] = []

    def counted(stack: Tensor) -> Tensor:
        worked.extend([stack[0].numel()] * len(stack))
        return work(stack)

    for exchange in plan:
        exchange.apply(flat, counted)
    return flat, result, [exchange.owners for exchange in plan], worked


def on_a_rank(style: str, max_elements: int) -> Any:
    dist.init_process_group("gloo")
    return exchanged(style, max_elements)


@pytest.mark.parametrize("style", ["flattened", "one by one"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("max_elements", [1, 12, 1 << 20])
def test_every_matrix_is_worked_on_whole_exactly_once(style, world_size, max_elements):
    results = run_ranks(on_a_rank, world_size, style, max_elements)
    for flat, target, owners, _ in results:
        assert torch.allclose(flat, target, rtol=1e-6, atol=1e-6)
        assert owners == results[0][2]
    worked = sorted(size for *_, sizes in results for size in sizes)
    assert worked == sorted(rows * columns for rows, columns in SHAPES)


def test_whole_matrices_stay_where_they_are(monkeypatch):
    from triptych_core.optim.exchange import plan_exchanges
    from triptych_core.optim.shards import Matrix, Piece, Shard

    matrices = tuple(Matrix((2, 2), (Piece(0, 0, 4, 4 * n),)) for n in range(2))
    flat = torch.arange(8.0)
    (exchange,) = plan_exchanges(Shard(flat, matrices, None))
    exchange.apply(flat, lambda stack: stack * 2)  # no process group: a collective would raise
    assert flat.tolist() == [2.0 * n for n in range(8)]


def test_equal_pieces_are_dealt_out_by_their_cost():
    from triptych_core.optim.exchange import _choose
    from triptych_core.optim.shards import Matrix, Piece

    def halves(rows: int, columns: int) -> Matrix:
        half = rows * columns // 2
        return Matrix((rows, columns), (Piece(0, 0, half, 0), Piece(1, half, 2 * half, 0)))

    load = [0.0, 0.0]
    owners = [_choose(halves(*shape), load) for shape in [(8, 8), (4, 4), (4, 4), (4, 4)]]
    assert owners == [0, 1, 1, 1]
