"""What does not go with `parallel.expert`, and why. Imports no torch."""

from __future__ import annotations

from triptych_core.plan.config import PlanConfig
from triptych_core.sections import EngineConfig, ParallelConfig


def check_expert(parallel: ParallelConfig, engine: EngineConfig, plan: PlanConfig) -> None:
    """Raise ValueError for settings that cannot go with experts divided over ranks."""
    if engine.zero.offloads:
        raise ValueError(
            "engine.zero: must not offload with parallel.expert, got offloading; DeepSpeed's norm "
            "of experts is wrong there (its issue 8475)"
        )
    if "auto" in (engine.zero.stage, engine.checkpointing) or plan.show != "no":
        raise ValueError(
            "parallel.expert: must be 1 for a plan, which does not know how experts are divided, "
            f"got {parallel.expert}; name engine.zero.stage and engine.checkpointing, and plan "
            "without it"
        )
    if parallel.tensor > 1:
        raise ValueError(
            f"parallel.tensor: must be 1 with parallel.expert, got {parallel.tensor}; "
            "share rows by parallel.sequence instead"
        )
