"""The loss guard: a bad step updates nothing on any rank, is put on record, and leaves no trace.

Whether an update is taken is decided on the device, between the gradient norm and the update, by
numbers that are the same on every rank. The host learns of it a step later, when the device has
long got there: it then takes back what it has counted (Adam's steps, by which moments are unbiased
and roundings drawn), so that all that follows is as in a run that never saw that batch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from triptych_core.config import StageConfig
from triptych_core.engine.light import LightEngine
from triptych_core.faults.codes import DIVERGED, EndsRun
from triptych_core.faults.loss_window import LossWindow
from triptych_core.lines import keep_steps_until

SKIPPED = "skipped.jsonl"


class LossGuard:
    """Lets good updates pass.

    Args:
        engine: what is trained; its optimizer asks before every update.
        config: of the run.
        say: prints one line on the main rank.
        start_step: the last step already taken; later lines of skipped.jsonl are forgotten.
    """

    SIZE = 5  # of a report

    def __init__(
        self, engine: Any, config: StageConfig, say: Callable[[str], None], start_step: int = 0
    ) -> None:
        guard = config.loss_guard
        self.engine, self._config, self._say = engine, guard, say
        self._path = config.run.dir / SKIPPED
        self._window = LossWindow(guard.window, guard.sigma, guard.min_steps, engine.device)
        self._in_a_row = 0
        self._loss = torch.zeros((), device=engine.device)
        self._report: Tensor | None = None  # of the step under way, once its update was asked for
        self._packs: list[dict[str, Any]] = []
        self._step = start_step
        if self.is_on:
            optimizer_of(engine).ask = self._admit
            if dist.get_rank() == 0:
                keep_steps_until(self._path, start_step)

    @property
    def is_on(self) -> bool:
        """Whether anything is judged."""
        return self._config.mode != "off"

    def expect(self, step: int, loss: Tensor, window: Sequence[dict[str, Any]]) -> None:
        """Before a step's update: its loss over all ranks, (), and this rank's batches."""
        self._step, self._loss, self._report = step, loss, None
        self._packs = [_describe(batch) for batch in window]

    def report(self) -> Tensor:
        """Of the step just taken: taken or not, loss, norm and the limits of both; (5,) fp32.

        Where the engine left an update out before it asked, its norm was no number.
        """
        if self._report is not None:
            return self._report
        none = torch.full((2,), torch.inf, device=self._loss.device)
        return torch.cat([torch.zeros_like(none[:1]), self._loss.float().view(1), none, none[:1]])

    def taken(self) -> Tensor:
        """() fp32 on the device: 1 if the step just taken updated anything, else 0."""
        if self.is_on:
            return self.report()[0]
        return _norm(self.engine, self._loss.device).isfinite().float()

    def learn(self, report: Sequence[float]) -> None:
        """What a report says, on the host; every rank at the same point, before the next update.

        Raises:
            EndsRun: more than `loss_guard.max_in_a_row` in a row, or the first with mode stop.
        """
        if not self.is_on:
            return
        if report[0]:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        if self._report is not None:
            optimizer_of(self.engine).forget_step()
        why = _reason(*report[1:])
        self._write(report, why)
        limit = 1 if self._config.mode == "stop" else self._config.max_in_a_row
        if self._in_a_row >= limit:
            raise EndsRun(
                DIVERGED,
                f"loss_guard: must take an update in {limit} step{'s' * (limit > 1)}, got none up "
                f"to step {self._step}, the last because its {why}; see {self._path}, lower "
                "optim.lr or look at those samples",
            )
        self._say(f"step {self._step} was left out: its {why}; samples in {self._path}")

    def state_dict(self) -> dict[str, Any]:
        """The window and the count; waits for the device."""
        return {"in_a_row": self._in_a_row, **self._window.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as `state_dict` was."""
        self._in_a_row = state["in_a_row"]
        self._window.load_state_dict(state)

    def _admit(self, scale: Tensor | None) -> Tensor:
        """The scale of an update's gradients, () fp32, or NaN, with which nothing changes.

        The optimizer asks with the scale it was given: DeepSpeed's once for each group.
        """
        if self._report is None:
            self._report = self._judge(_norm(self.engine, self._loss.device))
        is_taken = self._report[0] > 0
        scale = torch.ones_like(self._report[0]) if scale is None else scale
        return torch.where(is_taken.to(scale.device), scale, torch.nan)

    @torch.no_grad()
    def _judge(self, norm: Tensor) -> Tensor:
        pair = torch.stack([self._loss.float(), norm])
        limits = self._window.limits()
        is_taken = (pair.isfinite() & (pair <= limits)).all()
        self._window.add(pair, is_taken)
        return torch.cat([is_taken.float().view(1), pair, limits])

    def _write(self, report: Sequence[float], why: str) -> None:
        _, loss, norm, *_ = report
        packs: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(packs, self._packs)
        if dist.get_rank() != 0:
            return
        line = {
            "step": self._step,
            "why": why,
            "loss": loss if math.isfinite(loss) else None,
            "grad_norm": norm if math.isfinite(norm) else None,
            "packs": [{"rank": rank, **pack} for rank, some in enumerate(packs) for pack in some],
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def optimizer_of(engine: Any) -> Any:
    """Ours, whatever DeepSpeed has wrapped it in."""
    optimizer = engine.optimizer
    return optimizer if isinstance(engine, LightEngine) else optimizer.optimizer


def _norm(engine: Any, device: torch.device) -> Tensor:
    """The gradient norm of the update that is about to be made, () fp32."""
    if isinstance(engine, LightEngine):
        norm = engine.get_global_grad_norm()
    else:
        norm = engine.optimizer._global_grad_norm  # the engine's own is that of the step before
    if isinstance(norm, Tensor):
        return norm.detach().to(device, torch.float32).view(())
    return torch.full((), float(norm or 0.0), device=device)


def _describe(batch: dict[str, Any]) -> dict[str, Any]:
    """What a person finds a pack by."""
    place = batch.get("place")
    return {
        "position": getattr(place, "position", None),
        "keys": list(batch.get("sample_keys", ())),
    }


def _reason(loss: float, norm: float, max_loss: float, max_norm: float) -> str:
    for name, value, limit in (("loss", loss, max_loss), ("gradient norm", norm, max_norm)):
        if not math.isfinite(value):
            return f"{name} is {value}"
        if value > limit:
            return f"{name} is {value:.4g}, where the window allows {limit:.4g}"
    raise AssertionError("a step that was left out has a reason")
