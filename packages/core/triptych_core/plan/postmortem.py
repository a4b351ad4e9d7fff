"""What an OutOfMemoryError says beside the allocator: where, on which samples, and a way out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import nn

from triptych_core.plan.plan import Plan, Stage, remedy


@contextmanager
def name_batch(model: nn.Module, batch: Mapping[str, Any]) -> Iterator[None]:
    """Let an OutOfMemoryError name the module that was running and the samples of the batch.

    Costs nothing until there is one: the module is found in the error's own traceback.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        keys = [str(key) for key in batch.get("sample_keys", ())]
        shapes = ", ".join(
            f"{name} {tuple(value.shape)}"
            for name, value in batch.items()
            if isinstance(value, torch.Tensor) and name in ("input_ids", "pixel_values", "latents")
        )
        error.add_note(f"out of memory in {running_module(model, error.__traceback__)}, {shapes}")
        error.add_note(f"samples: {', '.join(keys) or 'not named'}")
        raise


@contextmanager
def suggest_remedy(config: Stage, plan: Callable[[Stage], Plan] | None) -> Iterator[None]:
    """Let an OutOfMemoryError end with the one setting that would have made the run fit.

    A stage without a plan has no advice.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        current = (config.engine.stage, config.engine.checkpointing)
        if plan is None or config.parallel.tensor > 1:
            raise  # no plan knows it
        try:
            shown = config.plan.model_copy(update={"show": "table"})  # all there is to choose from
            advice = remedy(plan(config.model_copy(update={"plan": shown})), current)
        except Exception as failure:  # the error that matters is the other one
            advice = f"no advice, since the plan failed: {failure!r}"
        error.add_note(f"to make it fit: {advice}")
        raise


def running_module(model: nn.Module, trace: TracebackType | None) -> str:
    """Name of the innermost module of `model` in a traceback, or what was running instead."""
    names = {id(module): name for name, module in model.named_modules()}
    found = ""
    phase = "forward"
    while trace is not None:
        frame = trace.tb_frame
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module) and names.get(id(module)):
            found = names[id(module)]
        if frame.f_code.co_name == "backward":
            phase = "backward"
        elif frame.f_code.co_name == "step" and not found:
            phase = "the optimizer's step"
        trace = trace.tb_next
    return f"{found} ({phase})" if found else phase
