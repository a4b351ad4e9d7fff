"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from triptych_core.checkpoint.saver import Resumed
from triptych_core.config import StageConfig
from triptych_core.faults.oversight import Oversight
from triptych_core.metrics import Metrics
from triptych_core.optim.groups import set_learning_rate
from triptych_core.optim.schedule import lr_scale
from triptych_core.plan.postmortem import name_batch
from triptych_core.readout import StepRecord

Batch = dict[str, Any]
Part = Callable[[Batch], Batch]  # of a row, what this rank computes
OnWindow = Callable[[int, Sequence[Batch]], None]
AfterUpdate = Callable[[Mapping[str, torch.Tensor], torch.Tensor], None]

# Grids and lengths describe shapes: on the device every look at one would stall the step.
HOST_KEYS = frozenset({"image_grid_thw", "audio_lengths"})
# For people and logs, not for the model.
LABEL_KEYS = frozenset(
    {"sample_keys", "sample_ids", "sample_epochs", "num_tokens", "holes", "place", "streams"}
)


def whole_row(batch: Batch) -> Batch:
    """What a rank computes that has its rows to itself."""
    return batch


def row_tokens(batch: Batch) -> int:
    """How many tokens a packed row can hold."""
    return int(batch["input_ids"].numel())


def train(
    engine: Any,
    batches: Iterator[Batch],
    config: StageConfig,
    *,
    flops: Callable[[Batch], float],
    metrics: Metrics,
    part: Part = whole_row,
    capacity: Callable[[Batch], int] = row_tokens,
    start_step: int = 0,
    last_step: int | None = None,
    on_step: Sequence[Callable[[int], None]] = (),
    on_window: OnWindow | None = None,
    after_update: AfterUpdate | None = None,
    oversight: Oversight | None = None,
) -> None:
    """Take optimizer steps until `last_step`, by default `config.run.steps`.

    The loss of a step is the sum over its target tokens divided by their number, over the whole
    accumulation window and all data ranks: never a mean of means. Where batches count the targets
    of a second objective (`num_second_targets`), models are told its `second_weight`: times that,
    its sum becomes the same mean when both are divided by the first's targets.

    `on_window` is called with a step and its batches, on the host, before their first forward.
    `on_step` functions are called with the step just taken, in order, on every rank; before them
    `after_update`, with the model's figures of the step over all ranks, if it has any, and () fp32
    on the device, 1 if its update was taken, else 0.

    Where `parallel.sequence` ranks hold a row between them, all of them are given that row, and
    each computes `part(row)`. `parallel.tensor` ranks compute the same with a part of the weights.
    `capacity` is what a batch's `num_tokens` could at most be.

    Raises:
        EndsRun: a rank was asked to stop, or the loss guard of `oversight` has had enough.
    """
    world_size, parallel = dist.get_world_size(), config.parallel
    replicas = world_size // parallel.tensor
    watch = oversight or Oversight(engine, config, metrics.note, Resumed(start_step))
    engine.train()
    last_step = config.run.steps if last_step is None else last_step
    for step in range(start_step + 1, last_step + 1):
        started = time.perf_counter()
        watch.heart.begin(step)
        scale = lr_scale(config.schedule, step, config.run.steps)
        set_learning_rate(engine.optimizer, config.schedule, step, config.run.steps)
        # The whole window first: every pack is divided by the same global number of targets, or
        # targets in sparse packs would weigh more than others.
        window = [next(batches) for _ in range(config.engine.gradient_accumulation_steps)]
        waited = time.perf_counter() - started
        if on_window is not None:
            watch.heart.mark("forward", window)
            on_window(step, window)
        watch.heart.mark("count", window)
        *rows, second, stops = count_window(window, flops, engine.device, asks=watch.asks)
        watch.send(stops)
        # Whole rows are counted, on each of the ranks that hold them: divided, nothing is lost.
        counts = torch.stack(rows) // parallel.ranks_per_row
        divisor = counts[0].clamp(min=1)
        further = {}
        if any("num_second_targets" in batch for batch in window):
            further["second_weight"] = divisor / (second // parallel.ranks_per_row).clamp(min=1)
        loss = torch.zeros((), device=engine.device)
        figures: dict[str, torch.Tensor] = {}
        for batch in map(part, window):
            watch.heart.mark("forward", [batch])
            with name_batch(engine.module, batch):
                output = engine(**to_device(batch, engine.device), **further)
                watch.heart.mark("backward")
                # DeepSpeed averages gradients over replicas: multiply their number back in.
                engine.backward(output.loss_sum * replicas / divisor, scale_wrt_gas=False)
                loss += output.loss_sum.detach() / divisor
                for name, value in output.metrics.items():
                    figures[name] = figures[name] + value if name in figures else value
                if engine.is_gradient_accumulation_boundary():
                    dist.all_reduce(loss)
                    watch.heart.mark("device")
                    watch.hear()
                    watch.expect(step, loss / parallel.tensor, window)
                    watch.heart.mark("update")
                engine.step()  # updates only after the window's last pack
        found = sum_figures(figures, divisor)
        if after_update is not None and found:
            after_update(found, watch.guard.taken())
        watch.heart.mark("metrics")
        metrics.record(
            StepRecord(
                step=step,
                loss=loss / parallel.tensor,
                counts=counts,
                grad_norm=engine.get_global_grad_norm(),
                lr=config.optim.lr * scale,
                capacity=sum(map(capacity, window)) * (world_size // parallel.ranks_per_row),
                data_wait_seconds=waited,
                figures=found,
            )
        )
        watch.heart.end()
        for function in on_step:
            function(step)
        watch.end(step)
    watch.settle()


def count_window(
    window: Sequence[Batch],
    flops: Callable[[Batch], float],
    device: torch.device,
    *,
    asks: bool = False,
) -> torch.Tensor:
    """(6,) int64 over all ranks: targets, tokens that are not padding, FLOPs, samples left out.

    And targets of a second objective, and how many ranks were asked to stop.
    """
    local = [
        sum(int(batch["num_targets"]) for batch in window),
        sum(int(batch["num_tokens"]) for batch in window),
        sum(int(flops(batch)) for batch in window),
        sum(len(batch.get("holes", ())) for batch in window),
        sum(int(batch.get("num_second_targets", 0)) for batch in window),
        int(asks),
    ]
    counts = torch.tensor(local, dtype=torch.int64).to(device, non_blocking=True)
    dist.all_reduce(counts)
    return counts


def sum_figures(
    figures: Mapping[str, torch.Tensor], divisor: torch.Tensor
) -> dict[str, torch.Tensor]:
    """A model's own figures over all ranks, in fp64: () divided like the loss, tables counted."""
    if not figures:
        return {}
    flat = torch.cat([value.detach().double().flatten() for value in figures.values()])
    dist.all_reduce(flat)
    parts = flat.split([value.numel() for value in figures.values()])
    return {
        name: part.view(value.shape) if value.dim() else part[0] / divisor
        for (name, value), part in zip(figures.items(), parts, strict=True)
    }


def to_device(batch: Batch, device: torch.device) -> Batch:
    """What the model's forward takes, with tensors on `device` except those kept on the host."""
    return {
        key: _copy(value, device)
        if isinstance(value, torch.Tensor) and key not in HOST_KEYS
        else value
        for key, value in batch.items()
        if key not in LABEL_KEYS
    }


def _copy(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    # From pageable memory the copy would wait for all work queued on the device.
    if device.type != "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
