"""What a rank is doing, said with every layer: some two microseconds each."""

from __future__ import annotations

import mmap
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from triptych_core.faults import page
from triptych_core.faults.page import KINDS, WARM_UP

_NUMBERS = {kind: number for number, kind in enumerate(KINDS)}


class Heartbeat:
    """Says in a page of shared memory where a rank is.

    Args:
        descriptor: of the memory, `page.SIZE` bytes; none: nobody looks.
    """

    def __init__(self, descriptor: int = -1) -> None:
        self._page = mmap.mmap(descriptor, page.SIZE)
        self._beats = self._step = self._steps = 0
        self._kind, self._module = 0, -1
        self._slowest = self._stop_at = self._began = 0.0
        self._handles: list[Any] = []

    def follow(self, layers: Sequence[nn.Module]) -> None:
        """Say which of these modules is running, forwards and backwards.

        Hooks stand around what torch.compile has made of a layer's forward, not in it.
        """
        for number, layer in enumerate(layers):
            self._handles += [
                layer.register_forward_pre_hook(partial(self._enter, number)),
                layer.register_forward_hook(partial(self._leave, number)),
            ]

    def begin(self, step: int) -> None:
        """A step begins: data are waited for."""
        self._began = time.monotonic()
        self._step, self._steps = step, self._steps + 1
        self.mark("data")

    def mark(self, kind: str, batches: Sequence[Mapping[str, Any]] = ()) -> None:
        """This is what it does now, with these batches."""
        if batches:
            keys = [str(key) for batch in batches for key in batch.get("sample_keys", ())]
            page.write_keys(self._page, ", ".join(keys))
        self._kind, self._module = _NUMBERS[kind], -1
        self._beat()

    def end(self) -> None:
        """A step is over; what follows may take long."""
        if self._steps >= WARM_UP:  # the next one is watched by it
            self._slowest = max(self._slowest, time.monotonic() - self._began)
        self.mark("between")

    def stop(self) -> None:
        """The rank was asked to stop, now."""
        self._stop_at = time.monotonic()
        self._beat()

    def _enter(self, number: int, module: nn.Module, args: Any) -> None:
        self._module = number
        self._beat()

    def _leave(self, number: int, module: nn.Module, args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor) and first.requires_grad and torch.is_grad_enabled():
            first.register_hook(partial(self._enter_backward, number))
        self._beat()

    def _enter_backward(self, number: int, gradient: Tensor) -> None:
        self._module = number
        self._beat()

    def _beat(self) -> None:
        self._beats += 1
        beat = page.Beat(
            self._beats,
            self._step,
            self._steps,
            self._kind,
            self._module,
            self._slowest,
            self._stop_at,
            "",
        )
        page.write(self._page, beat)
