"""Recompilations after warm-up: each costs seconds, and none should happen in a steady run."""

from __future__ import annotations

import sys

import torch.distributed as dist
from torch._dynamo.utils import get_compilation_metrics

WARM_UP = 3  # steps: image and text-only rows, and sizes that become dynamic at their second value


class RecompileWatch:
    """Call it after each step: says on stderr what was compiled again, and why."""

    def __init__(self, start_step: int = 0) -> None:
        self._warm_until = start_step + WARM_UP
        self._seen_until = 0

    def __call__(self, step: int) -> None:
        for place, reason in self.news():
            if step > self._warm_until:
                print(  # noqa: T201
                    f"step {step}  rank {dist.get_rank()} compiled {place} again: {reason}",
                    file=sys.stderr,
                    flush=True,
                )

    def news(self) -> list[tuple[str, str]]:
        """Place and guard that failed, of each recompilation since the last call."""
        found = []
        for event in get_compilation_metrics():
            began = event.start_time_us or 0
            if began > self._seen_until and event.recompile_reason:
                place = f"{event.co_name} ({event.co_filename}:{event.co_firstlineno})"
                found.append((place, " ".join(event.recompile_reason.split())))
        self._seen_until = max(
            [self._seen_until, *(event.start_time_us or 0 for event in get_compilation_metrics())]
        )
        return found
