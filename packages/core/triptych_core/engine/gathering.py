"""When the cut weights of ZeRO-3 are whole: layer by layer, the next on its way meanwhile.

A layer's weights are gathered before its forward and before its backward, and freed after; those of
the last layers, as far as `max_live` goes, stay between the two. What is in no layer (embeddings,
the head, small weights) is gathered once, by the first module that needs it, and freed after the
window's last backward. On CUDA a gather that was begun runs in NCCL's stream beside the layer
before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

from torch import Tensor, nn

from triptych_core.engine.buckets import first_kept
from triptych_core.engine.cut_weights import CutWeights


class Gathering:
    """Hooks in a model that have weights whole while they are needed.

    All ranks must call the same layers in the same order, forward and backward.

    Args:
        model: its forward begins a pass; any part of it may be called without.
        layers: in the order in which they run.
        weights: all that is cut, with the number of its layer, or None.
        max_live: elements that may be whole at the same time, if no more are needed.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[nn.Module],
        weights: Iterable[tuple[int | None, CutWeights]],
        max_live: int,
    ) -> None:
        self._layers: list[list[CutWeights]] = [[] for _ in layers]
        self._outside: list[CutWeights] = []
        for number, each in weights:
            (self._outside if number is None else self._layers[number]).append(each)
        self._kept = first_kept(_numel(self._outside), list(map(_numel, self._layers)), max_live)
        self._is_backward = False
        self._last: int | None = None  # of those that ran, whose backward is to come
        self._before: dict[int, int | None] = {}  # a layer that ran -> the one that ran before it
        self._current: int | None = None  # in backward
        self._hooks = [model.register_forward_pre_hook(self._begin)]
        for number, layer in enumerate(layers):
            self._hooks += [
                layer.register_forward_pre_hook(partial(self._before_layer, number)),
                layer.register_forward_hook(partial(self._after_layer, number)),
            ]
        for module in _owners(model, layers, self._outside):
            self._hooks.append(module.register_forward_pre_hook(self._gather_outside))

    @contextmanager
    def backward(self, *, is_last: bool) -> Iterator[None]:
        """While the backward of a micro-step runs; is_last: of the window."""
        self._is_backward, self._current = True, None
        try:
            yield
        finally:
            self._is_backward = False
            self._before, self._last = {}, None
        self._free_layers()
        if is_last:
            self.free()

    def free(self) -> None:
        """Have nothing whole, as before anything ran, or once parts have changed."""
        self._free_layers()
        for weights in self._outside:
            weights.free()

    def remove(self) -> None:
        """Take the hooks out of the model."""
        for hook in self._hooks:
            hook.remove()

    def _begin(self, *_: Any) -> None:
        self._before, self._last = {}, None
        for weights in [*self._outside, *chain(*self._layers[:1])]:
            weights.start()

    def _gather_outside(self, *_: Any) -> None:
        for weights in self._outside:
            weights.gather()

    def _before_layer(self, number: int, *_: Any) -> None:
        self._gather_outside()
        self._gather(number)
        if not self._is_backward and number + 1 < len(self._layers):
            self._start(number + 1)

    def _after_layer(self, number: int, _: Any, args: Any, output: Any) -> None:
        if self._is_backward:
            return  # computed again: its backward comes now
        given = output if isinstance(output, tuple) else (output,)
        found = [each for each in given if isinstance(each, Tensor) and each.requires_grad]
        for each in found:
            each.register_hook(partial(self._before_backward, number))
        if found:
            self._before[number], self._last = self._last, number
        if not found or number < self._kept:
            self._free(number)

    def _before_backward(self, number: int, _: Tensor) -> None:
        """Of the layer that ran after this one nothing is left to do."""
        if self._current == number:
            return
        if self._current is not None:
            self._free(self._current)
        self._current, before = number, self._before.get(number)
        self._gather_outside()
        self._gather(number)
        if before is not None:
            self._start(before)

    def _start(self, number: int) -> None:
        for weights in self._layers[number]:
            weights.start()

    def _gather(self, number: int) -> None:
        for weights in self._layers[number]:
            weights.gather()

    def _free(self, number: int) -> None:
        for weights in self._layers[number]:
            weights.free()

    def _free_layers(self) -> None:
        for number in range(len(self._layers)):
            self._free(number)


def _numel(weights: Sequence[CutWeights]) -> int:
    """Elements that gathering makes whole."""
    return sum(each.whole.numel() for each in weights if each.is_divided)


def _owners(
    model: nn.Module, layers: Sequence[nn.Module], weights: Sequence[CutWeights]
) -> list[nn.Module]:
    """The modules outside of layers that hold a parameter of `weights` themselves."""
    inside = {id(module) for layer in layers for module in layer.modules()}
    held = {parameter for each in weights for parameter in each.begins}
    return [
        module
        for module in model.modules()
        if id(module) not in inside and any(p in held for p in module.parameters(recurse=False))
    ]
