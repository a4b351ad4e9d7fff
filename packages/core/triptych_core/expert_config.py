"""What does not go with `parallel.expert`, and why. Imports no torch."""

from __future__ import annotations

from triptych_core.plan_config import PlanConfig
from triptych_core.sections import EngineConfig, OptimConfig, ParallelConfig


def check_expert(
    parallel: ParallelConfig, engine: EngineConfig, optim: OptimConfig, plan: PlanConfig
) -> None:
    """Raise ValueError for settings that cannot go with experts divided over ranks."""
    if engine.zero.stage not in (0, 3):
        raise ValueError(
            "engine.zero.stage: must be 0 or 3 with parallel.expert, got "
            f"{engine.zero.stage}; DeepSpeed's norm of experts under stages 1 and 2 is wrong "
            "(its issue 8475) and no plan knows them"
        )
    if engine.zero.offload_optimizer or engine.zero.offload_params:
        raise ValueError(
            "engine.zero: must not offload with parallel.expert; the step on the host is "
            "DeepSpeed's, whose norm of experts is wrong (its issue 8475)"
        )
    if engine.checkpointing == "auto" or plan.show != "no":
        raise ValueError(
            "parallel.expert: must be 1 for a plan, which does not know how experts are divided, "
            f"got {parallel.expert}; name engine.checkpointing and plan without it"
        )
    if optim.name == "muon":
        raise ValueError(
            "optim.name: must be adamw with parallel.expert, got muon; it has not been compared "
            "with one rank"
        )
    if parallel.tensor > 1:
        raise ValueError(
            f"parallel.tensor: must be 1 with parallel.expert, got {parallel.tensor}; "
            "share rows by parallel.sequence instead"
        )
