"""What ranks know of each other, once a step: whether one must stop, what became of updates.

Both must be acted on by all ranks at the same step. That a rank was asked to stop is one more
number in the sum over ranks that every step begins with; it and the loss guard's report of the step
before go to the host in one copy, which is looked at when all of the step but its update is queued.
The device has long begun this step then, or the host was too far ahead: it waits for the device,
with a forward and a backward pass queued, and never the device for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from triptych_core.checkpoint.saver import Resumed
from triptych_core.config import StageConfig
from triptych_core.faults.codes import PREEMPTED, EndsRun
from triptych_core.faults.heartbeat import Heartbeat
from triptych_core.faults.loss_guard import LossGuard
from triptych_core.faults.stop import StopRequest
from triptych_core.readout import Mark, to_host

NEW = Resumed()  # a fresh start


class Oversight:
    """The loop's view of faults.

    Args:
        engine: what is trained.
        config: of the run.
        say: prints one line on the main rank.
        resumed: the last step already taken, and the guard's state then.
        asked: whether this rank was asked to stop.
        heart: told what this rank does.
    """

    def __init__(
        self,
        engine: Any,
        config: StageConfig,
        say: Callable[[str], None],
        resumed: Resumed = NEW,
        *,
        asked: StopRequest | None = None,
        heart: Heartbeat | None = None,
    ) -> None:
        self.guard = LossGuard(engine, config, say, resumed.step)
        if resumed.loss_guard is not None:
            self.guard.load_state_dict(resumed.loss_guard)
        self.heart = heart or Heartbeat()
        self.leave: Callable[[int], None] | None = None
        """called on every rank with the last step, before all end because one was asked to"""
        self._asked = asked
        self._is_pending = False  # whether the step before has not been learned of
        self._stops = False
        self._coming: tuple[Tensor, Mark] | None = None

    @property
    def asks(self) -> bool:
        """Whether this rank was asked to stop."""
        return self._asked is not None and self._asked.is_set

    def send(self, stops: Tensor) -> None:
        """Early in a step: the number of ranks that were asked to stop, (), is on its way."""
        report = [self.guard.report()] if self._is_pending else []
        words = torch.cat([*report, stops.view(1).float()])
        self._coming = (to_host(words), Mark())

    def hear(self) -> None:
        """Before the step's update: what was sent has arrived, on every rank.

        Raises:
            EndsRun: the loss guard ends the run.
        """
        assert self._coming is not None
        words, arrived = self._coming
        arrived.wait()
        *report, stops = words.tolist()
        self._stops |= stops > 0
        self._learn(report)

    def expect(self, step: int, loss: Tensor, window: Sequence[dict[str, Any]]) -> None:
        """The update that comes next is of this step, with its loss over all ranks, ()."""
        self.guard.expect(step, loss, window)
        self._is_pending = self.guard.is_on

    def settle(self) -> None:
        """After a step: wait until the device has done it, and learn what became of it."""
        if self._is_pending:
            self._learn(self.guard.report().tolist())

    def end(self, step: int) -> None:
        """After a step and all that is done after it.

        Raises:
            EndsRun: a rank was asked to stop.
        """
        if self._stops:
            self.settle()
            if self.leave is not None:
                self.leave(step)
            raise EndsRun(PREEMPTED, f"stopped after step {step}; the same command goes on")

    def state_dict(self) -> dict[str, Any]:
        """Of the loss guard, after `settle`."""
        self.settle()
        return self.guard.state_dict()

    def _learn(self, report: Sequence[float]) -> None:
        if self._is_pending:
            self._is_pending = False
            self.guard.learn(report)
