"""Inputs of layers in host memory between forward and backward.

With full checkpointing a layer keeps its input alone; on long rows those are still the most of all
activations. Here they are copied to the host beside the computation, and come back one layer before
they are needed. As in ALST (arXiv 2506.13996); the copies and their order are our own.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor


class InputStore:
    """The inputs of a model's layers in one forward, in the order in which they ran.

    At most two are on the device: of the layer that runs, and of the one before or, in backward,
    the one that comes next.
    """

    def __init__(self) -> None:
        self._last: KeptInput | None = None

    def keep(self, x: Tensor) -> KeptInput:
        """Begin to copy x to the host, and forget the device's copy of the input kept before."""
        if self._last is not None:
            self._last.let_go()
        self._last = KeptInput(x, self._last)
        return self._last


class KeptInput:
    """One layer's input (1, T, H): on the device, on the host, or on its way."""

    def __init__(self, x: Tensor, before: KeptInput | None) -> None:
        self._device, self._requires_grad = x.device, x.requires_grad
        self._here: Tensor | None = x
        # The graph holds each input while it needs it; a chain would hold all to the last.
        self._before = weakref.ref(before) if before is not None else None
        self._was_taken = False
        with torch.no_grad(), _beside(x.device):
            self._host = to_host(x)
            self._arrived = _mark(x.device)

    @property
    def is_here(self) -> bool:
        """Whether the device has it, or will have when the copy that was begun is made."""
        return self._here is not None

    def take(self) -> Tensor:
        """For the forward, x itself; for what is computed again, its copy, and the one before it
        sets out."""
        if not self._was_taken:
            self._was_taken = True
            assert self._here is not None
            return self._here
        self.fetch()
        before = self._before() if self._before is not None else None
        if before is not None:
            before.fetch()
        _wait(self._device, self._arrived)
        x, self._here = self._here, None
        assert x is not None
        return x

    def let_go(self) -> None:
        """Free the device's copy once the host has its own."""
        _wait(self._device, self._arrived)
        self._here = None

    @torch.no_grad()
    def fetch(self) -> None:
        """Begin to copy it back, unless it is here."""
        if self._here is None:
            # Made on the stream that will use it and free it; the copy comes after what that
            # stream was given so far, so the memory is no longer in use.
            self._here = torch.empty_like(self._host, device=self._device)
            with _beside(self._device):
                self._here.copy_(self._host, non_blocking=True)
                self._arrived = _mark(self._device)
            self._here.requires_grad_(self._requires_grad)


@torch.library.custom_op("triptych_models::to_host", mutates_args=())
def to_host(x: Tensor) -> Tensor:
    """A copy of x in host memory, made without waiting; pinned, so that it can be."""
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.device.type != "cpu")
    return host.copy_(x, non_blocking=True)


@to_host.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype)


@cache
def _stream(device: torch.device) -> Any:
    return torch.get_device_module(device).Stream(device)


@contextmanager
def _beside(device: torch.device) -> Iterator[None]:
    """Work given inside runs after what the device was given so far, beside what comes then."""
    if device.type == "cpu":
        yield
        return
    module = torch.get_device_module(device)
    _stream(device).wait_stream(module.current_stream(device))
    with module.stream(_stream(device)):
        yield


def _mark(device: torch.device) -> Any:
    """This moment in the side stream."""
    return None if device.type == "cpu" else _stream(device).record_event()


def _wait(device: torch.device, moment: Any) -> None:
    """What the device is given from now on runs after that moment; the host does not wait."""
    if moment is not None:
        torch.get_device_module(device).current_stream(device).wait_event(moment)
