"""What does not go with `parallel.expert`, and why. Imports no torch."""

from __future__ import annotations

from triptych_core.sections import EngineConfig, ParallelConfig


def check_expert(parallel: ParallelConfig, engine: EngineConfig) -> None:
    """Raise ValueError for settings that cannot go with experts divided over ranks."""
    if engine.zero.offloads:
        raise ValueError(
            "engine.zero: must not offload with parallel.expert, got offloading; DeepSpeed's norm "
            "of experts is wrong there (its issue 8475)"
        )
    if parallel.tensor > 1:
        raise ValueError(
            f"parallel.tensor: must be 1 with parallel.expert, got {parallel.tensor}; "
            "share rows by parallel.sequence instead"
        )
