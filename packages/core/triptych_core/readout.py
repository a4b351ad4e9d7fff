"""Figures of steps stay on the device until an interval of them is read at once.

Reading one number makes the host wait until the device has done everything queued before it; then
the device in turn waits for the host to queue more. So a step only leaves its tensors here, and a
copy of many steps' is begun at the end of an interval and looked at when one more step is queued.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor


@dataclass(frozen=True)
class StepRecord:
    """What the loop knows of a step; tensors are read when their interval is over."""

    step: int
    loss: Tensor  # ()
    counts: Tensor  # (4,) int64: targets, tokens, FLOPs, bad samples over all ranks
    grad_norm: Tensor | float | None
    lr: float
    capacity: int  # tokens the step's rows could hold
    data_wait_seconds: float
    figures: Mapping[str, Tensor] = field(default_factory=dict)  # the model's own


@dataclass(frozen=True)
class FinishedStep:
    """A step with its figures on the host."""

    record: StepRecord
    loss: float
    counts: tuple[int, ...]
    grad_norm: float | None
    seconds: float  # from the end of the step before to its own, waiting for data included
    time: float  # since the epoch, when it was queued
    figures: Mapping[str, Any]  # numbers, and tables of counts as nested lists


class Mark:
    """A moment in the work of the device: when it gets there, not when that was queued."""

    def __init__(self) -> None:
        self._seconds = time.perf_counter()
        self._event: Any = None
        if not get_accelerator().is_synchronized_device():
            self._event = get_accelerator().Event(enable_timing=True)
            self._event.record()

    def is_past(self) -> bool:
        """Whether the device has got there; does not wait."""
        return self._event is None or bool(self._event.query())

    def wait(self) -> None:
        """Until the device gets there."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: Mark) -> float:
        """Between two moments that are past."""
        if self._event is None:
            return self._seconds - earlier._seconds
        return float(earlier._event.elapsed_time(self._event)) / 1e3


@dataclass(frozen=True)
class _Step:
    record: StepRecord
    began: Mark
    ended: Mark
    time: float


@dataclass(frozen=True)
class _Copy:
    """Figures of some steps on their way to the host; there when `ended` is past."""

    steps: Sequence[_Step]
    floats: Tensor  # losses, then those norms that are tensors
    figures: Sequence[Mapping[str, Tensor]]  # of each step
    counts: Tensor  # (steps, 4)
    ended: Mark


class Readout:
    """Steps whose figures are not on the host yet."""

    def __init__(self) -> None:
        self._waiting: list[_Step] = []
        self._coming: _Copy | None = None
        self._last = Mark()

    def restart_clock(self) -> None:
        """The next step begins when the device has done everything queued so far."""
        self._last = Mark()

    def add(self, record: StepRecord) -> None:
        """A step that has just been queued; it began where the one before ended."""
        ended = Mark()
        self._waiting.append(_Step(record, self._last, ended, time.time()))
        self._last = ended

    def fetch(self) -> None:
        """Begin to copy all steps that wait; does not wait for the device."""
        assert self._coming is None, "take() what was fetched first"
        if self._waiting:
            self._coming = _copy(self._waiting)
            self._waiting = []

    def take(self) -> list[FinishedStep]:
        """What was fetched last; waits until it has arrived."""
        coming, self._coming = self._coming, None
        return [] if coming is None else _finish(coming)

    def take_all(self) -> list[FinishedStep]:
        """All steps; waits until the device has done them."""
        steps = self.take()
        self.fetch()
        return steps + self.take()

    def take_finished(self) -> list[FinishedStep]:
        """The steps that the device has done, though it may never do the rest: a peer has died."""
        steps = [*(self._coming.steps if self._coming else ()), *self._waiting]
        self._coming, self._waiting = None, []
        done = [step for step in steps if step.ended.is_past()]
        if not done:
            return []
        accelerator = get_accelerator()
        if accelerator.is_synchronized_device():
            return _finish(_copy(done))
        with accelerator.stream(accelerator.Stream()):  # not behind what may never end
            return _finish(_copy(done))


def _copy(steps: Sequence[_Step]) -> _Copy:
    records = [step.record for step in steps]
    norms = [record.grad_norm for record in records]
    scalars = [record.loss for record in records] + [n for n in norms if isinstance(n, Tensor)]
    floats = to_host(torch.stack([scalar.detach().float().reshape(()) for scalar in scalars]))
    counts = to_host(torch.stack([record.counts for record in records]))
    figures = [{k: to_host(v) for k, v in record.figures.items()} for record in records]
    return _Copy(tuple(steps), floats, figures, counts, Mark())


def to_host(tensor: Tensor) -> Tensor:
    """A copy that is on its way to the host, or the tensor itself on a CPU."""
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def _finish(copy: _Copy) -> list[FinishedStep]:
    copy.ended.wait()
    floats, counts = copy.floats.tolist(), copy.counts.tolist()
    losses, norms = floats[: len(copy.steps)], iter(floats[len(copy.steps) :])
    return [
        FinishedStep(
            record=step.record,
            loss=loss,
            counts=tuple(numbers),
            grad_norm=next(norms) if isinstance(norm, Tensor) else norm,
            seconds=step.ended.seconds_since(step.began),
            time=step.time,
            figures={k: (v.long() if v.dim() else v).tolist() for k, v in figures.items()},
        )
        for step, loss, numbers, figures in zip(
            copy.steps, losses, counts, copy.figures, strict=True
        )
        for norm in [step.record.grad_norm]
    ]
