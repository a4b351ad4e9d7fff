"""Evaluation of a model that draws: held-out loss, and a picture of what it draws."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from triptych_core.config import StageConfig, is_due
from triptych_core.engine.averaged import averaged_weights
from triptych_core.evaluation.evaluate import (
    Evaluation,
    append_evaluation,
    figures,
    heldout_loss,
)
from triptych_core.loop import Batch
from triptych_core.metrics import Metrics
from triptych_core.report.pictures import png_uri


def draw_if_due(
    engine: Any,
    config: StageConfig,
    heldout: Callable[[], Iterable[Batch]] | None,
    draw: Callable[[], np.ndarray],
    metrics: Metrics,
    step: int,
) -> None:
    """Before the first step, every `evaluation.every` steps and after the last.

    heldout: this rank's batches, equally many on every rank. draw: a picture (H, W, 3) uint8.
    Weights are their averages under `optim.ema_decay`. Every rank takes part; the main one adds a
    line to `evaluation.jsonl`.
    """
    if not (step == 0 or is_due(step, config.evaluation.every, config.run.steps)):
        return
    metrics.note(f"step {step}  evaluating")
    with averaged_weights(engine):
        loss = None if heldout is None else heldout_loss(engine, heldout())
        engine.eval()
        with torch.no_grad():
            picture = draw()
        engine.train()
    if dist.get_rank() == 0:
        evaluation = Evaluation(step, loss, {}, {}, {}, picture=png_uri(picture))
        append_evaluation(config.run.dir, evaluation)
        metrics.record_evaluation(step, figures(evaluation), [])
    told = "drawn" if loss is None else f"held-out loss {loss:.4f}"
    metrics.note(f"step {step}  {told}")
    metrics.restart_clock()
