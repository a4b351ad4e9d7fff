"""Learning-rate schedules: pure functions from a step to a factor on the peak rate."""

from __future__ import annotations

import math

from triptych_core.config import ScheduleConfig


def lr_scale(config: ScheduleConfig, step: int, num_steps: int) -> float:
    """The factor for optimizer step `step` in 1..num_steps.

    Warm-up rises linearly and reaches 1 at `warmup_steps`; every shape that falls reaches
    `min_ratio` exactly at `num_steps`. WSD (warm-up, stable, decay; MiniCPM, arXiv 2404.06395)
    falls linearly over its last `decay_steps`.
    """
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    falling = 1.0 - config.min_ratio
    if config.kind == "constant":
        return 1.0
    if config.kind == "wsd":
        left = num_steps - step
        if left >= config.decay_steps:
            return 1.0
        return config.min_ratio + falling * left / config.decay_steps
    progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    if config.kind == "linear":
        return config.min_ratio + falling * (1.0 - progress)
    return config.min_ratio + falling * 0.5 * (1.0 + math.cos(math.pi * progress))
