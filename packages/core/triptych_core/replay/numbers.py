"""Where in a model a number stops being one: forwards, and backwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Seen(NamedTuple):
    """A tensor that passed: of which module, at which end, and if all is finite, ()."""

    module: str
    end: str
    is_finite: Tensor


class Numbers:
    """Looks at what the modules of a model give and get, in the order in which it comes about.

    Nothing is waited for: flags stay on the device until they are asked for.
    """

    def __init__(self) -> None:
        self.forward: list[Seen] = []
        self.backward: list[Seen] = []
        self._is_forward = False

    @contextmanager
    def watched(self, model: nn.Module, skip: Sequence[nn.Module] = ()) -> Iterator[None]:
        """Look at all modules but those inside `skip`, into which a compiler has put its own."""
        inside = {id(m) for top in skip for m in top.modules() if m is not top}
        handles: list[Any] = []
        for name, module in model.named_modules():
            if id(module) in inside or not name:
                continue
            before = partial(self._enter, name)
            handles += [
                module.register_forward_pre_hook(before, with_kwargs=True),
                module.register_forward_hook(partial(self._leave, name)),
            ]
        handles += [
            model.register_forward_pre_hook(lambda *_: self._switch(True)),
            model.register_forward_hook(lambda *_: self._switch(False)),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def first_forward(self) -> str | None:
        """The module that first gave what is no number: modules inside one come before it."""
        flags = _flags(self.forward)
        return next((s.module for s, ok in zip(self.forward, flags, strict=True) if not ok), None)

    def first_backward(self) -> str | None:
        """The innermost module whose gradients came in as numbers and left as none.

        Where there is none, the module to whose output the first bad one came.
        """
        flags = _flags(self.backward)
        if all(flags):
            return None
        first = flags.index(False)
        sound = {s.module for s in self.backward[:first] if s.end == "out"}
        passed = [
            seen.module
            for seen, ok in zip(self.backward[first:], flags[first:], strict=True)
            if not ok and seen.end == "in" and seen.module in sound
        ]
        return max(passed, key=lambda name: name.count("."), default=self.backward[first].module)

    def _switch(self, on: bool) -> None:
        self._is_forward = on

    def _enter(self, name: str, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        for tensor in _floats([*args, *kwargs.values()]):
            _watch_gradient(tensor, self._note(name, "in"))

    def _leave(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        for tensor in _floats(output if isinstance(output, tuple | list) else [output]):
            if self._is_forward:  # not when it is computed again for the backward
                self.forward.append(Seen(name, "out", tensor.detach().isfinite().all()))
            _watch_gradient(tensor, self._note(name, "out"))

    def _note(self, name: str, end: str) -> Callable[[Tensor], None]:
        def note(gradient: Tensor) -> None:
            self.backward.append(Seen(name, end, gradient.detach().isfinite().all()))

        return note


def _watch_gradient(tensor: Tensor, note: Callable[[Tensor], None]) -> None:
    if tensor.requires_grad and torch.is_grad_enabled():
        tensor.register_hook(note)


def _floats(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            yield value


def _flags(seen: Sequence[Seen]) -> list[bool]:
    return torch.stack([s.is_finite for s in seen]).tolist() if seen else []
