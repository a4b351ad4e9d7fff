"""Work on files that all ranks do together: what fails on one of them fails on all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist


def on_all(function: Callable[[], Any], group: Any = None) -> list[Any]:
    """Call it on every rank of a group; returns each one's result.

    Raises:
        ValueError: on all ranks, where one of them raised OSError or ValueError. Raised there
            alone, the others would wait for it until the backend gives up.
    """
    result: tuple[Any, str | None]
    try:
        result = (function(), None)
    except (OSError, ValueError) as error:
        result = (None, str(error))
    results: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(results, result, group=group)
    for rank, (_, problem) in enumerate(results):
        if problem is not None:
            raise ValueError(problem if rank == 0 else f"rank {rank}: {problem}")
    return [value for value, _ in results]


def on_main(function: Callable[[], Any], group: Any = None) -> Any:
    """Call it on the main rank while the others wait; all have its result, or what it raised."""
    return on_all(function if dist.get_rank() == 0 else lambda: None, group)[0]
