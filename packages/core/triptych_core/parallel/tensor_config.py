"""What does not go with `parallel.tensor`, and why. Imports no torch."""

from __future__ import annotations

from triptych_core.plan.config import PlanConfig
from triptych_core.sections import EngineConfig, OptimConfig


def check_tensor(engine: EngineConfig, optim: OptimConfig, plan: PlanConfig) -> None:
    """Raise ValueError for settings that cannot go with weights cut over ranks."""
    if engine.zero.stage not in (1, 2, 3):
        raise ValueError(
            "engine.zero.stage: must be 1, 2 or 3 with parallel.tensor, which DeepSpeed's engine "
            f"does and no plan knows, got {engine.zero.stage}; name a stage"
        )
    if engine.checkpointing in ("auto", "selective"):
        why = {
            "auto": "no plan knows parallel.tensor",
            "selective": "a product is kept before its sum over ranks and summed again",
        }
        raise ValueError(
            "engine.checkpointing: must be none, full or offload with parallel.tensor, got "
            f"{engine.checkpointing}; {why[engine.checkpointing]}"
        )
    if plan.show != "no":
        raise ValueError(
            "parallel.tensor: must be 1 for a plan, which does not know it; plan without it"
        )
    if optim.name == "muon":
        raise ValueError(
            "optim.name: must be adamw with parallel.tensor, got muon; a part of a matrix made "
            "orthogonal is not that part of the orthogonal matrix"
        )
