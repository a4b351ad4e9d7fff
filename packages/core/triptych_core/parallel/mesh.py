"""Which ranks hold which rows: data, and inside it sequence and tensor parallelism."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from triptych_core.launch import Runtime
from triptych_core.sections import ParallelConfig


@dataclass(frozen=True)
class Mesh:
    """Where a rank stands: its row is the dp_rank-th of dp_size, its part of that the sp_rank-th,
    and of the weights it has the tp_rank-th part.

    sp_group is the name of the process group of the ranks that hold the row; "" for a rank that
    has its row to itself. For ZeRO all ranks of one tp_rank are alike: it averages gradients over
    all of them.
    """

    dp_rank: int
    dp_size: int
    sp_rank: int
    sp_size: int
    sp_group: str
    tp_rank: int = 0
    tp_size: int = 1


def make_mesh(config: ParallelConfig, runtime: Runtime) -> Mesh:
    """Let every `parallel.sequence` × `parallel.tensor` consecutive ranks hold one row.

    Those that divide weights stand next to each other, as DeepSpeed has it. All ranks must call it.

    Raises ValueError where the ranks cannot be grouped.
    """
    n, tensor, world_size = config.sequence, config.tensor, runtime.world_size
    config.check_ranks(world_size)
    dp_rank, rest = divmod(runtime.rank, config.ranks_per_row)
    sp_rank, tp_rank = divmod(rest, tensor)
    name = ""
    if n > 1:
        # Every rank takes part in making every group, in the same order.
        firsts = [
            row + part
            for row in range(0, world_size, config.ranks_per_row)
            for part in range(tensor)
        ]
        groups: list[Any] = [
            dist.new_group([first + tensor * i for i in range(n)]) for first in firsts
        ]
        name = groups[dp_rank * tensor + tp_rank].group_name
    return Mesh(dp_rank, world_size // config.ranks_per_row, sp_rank, n, name, tp_rank, tensor)
