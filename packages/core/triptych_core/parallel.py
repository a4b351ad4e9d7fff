"""Which ranks hold which rows: data parallelism, and sequence parallelism inside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from triptych_core.launch import Runtime
from triptych_core.sections import ParallelConfig


@dataclass(frozen=True)
class Mesh:
    """Where a rank stands: its row is the dp_rank-th of dp_size, its part of that the sp_rank-th.

    sp_group is the name of the process group of the ranks that hold the row; "" for a rank that
    has its row to itself. For ZeRO all ranks are alike: it averages gradients over all of them.
    """

    dp_rank: int
    dp_size: int
    sp_rank: int
    sp_size: int
    sp_group: str


def make_mesh(config: ParallelConfig, runtime: Runtime) -> Mesh:
    """Let every `parallel.sequence` consecutive ranks hold one row; all ranks must call it.

    Raises ValueError where the ranks cannot be grouped.
    """
    n, world_size = config.sequence, runtime.world_size
    if world_size % n:
        raise ValueError(
            f"parallel.sequence: must divide the number of ranks ({world_size}), got {n}; "
            f"start a multiple of {n} ranks or lower it"
        )
    dp_rank, sp_rank = divmod(runtime.rank, n)
    name = ""
    if n > 1:
        # Every rank takes part in making every group, in the same order.
        starts = range(0, world_size, n)
        groups: list[Any] = [dist.new_group(list(range(start, start + n))) for start in starts]
        name = groups[dp_rank].group_name
    return Mesh(dp_rank, world_size // n, sp_rank, n, name)
