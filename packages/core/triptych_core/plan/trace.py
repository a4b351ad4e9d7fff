"""What a micro-step holds and moves, found by running it on fake tensors: shapes without values.

The real forward and backward run, op by op, and every storage is counted from the op that makes it
to the moment it is freed, as an allocator would. The idea is that of torch's MemTracker
(torch.distributed._tools); counting on our own is faster and also sees how gradients arrive.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_BLOCK = 512  # bytes: the CUDA allocator's granularity


# Of an op, from its arguments: bytes it takes that its outputs do not show, while it runs and for
# as long as its outputs live.
Workspaces = Mapping[str, Callable[..., tuple[int, int]]]
# Of an op, from its arguments: bytes that it sends to other ranks.
Crossings = Mapping[str, Callable[..., float]]
# Of an op that torch does not count, from its arguments and `out_val`: FLOPs of its products.
Formulas = Mapping[str, Callable[..., int]]


class MicroStep(NamedTuple):
    """A micro-step beside weights, optimizer states and the gradients that have been handed over.

    moments are the (bytes live, gradient elements handed over) that no other moment exceeds in
    both. kept is live after the forward. products is FLOPs of torch's matrix products; traffic is
    bytes read and written by other ops; launches counts ops that compute something; crossing is
    bytes sent to other ranks.
    """

    moments: list[tuple[int, int]]
    kept: int
    products: int
    traffic: int
    launches: int
    crossing: float = 0.0


def trace_micro_step(
    forward: Callable[[], Tensor],
    parameters: Iterable[nn.Parameter],
    others: Iterable[Tensor] = (),
    workspaces: Workspaces | None = None,
    crossings: Crossings | None = None,
    formulas: Formulas | None = None,
) -> MicroStep:
    """Run `forward` and its backward under the active FakeTensorMode.

    A gradient is taken away as soon as it is complete, as ZeRO takes it.

    Args:
        forward: computes the loss ().
        parameters: their storages are not counted, and their gradients until handed over.
        others: tensors that exist before and are not counted, e.g. buffers.
        workspaces: by the name of an op, e.g. "triptych::linear_cross_entropy", what it takes
            beside its outputs, from its arguments.
        crossings: by the name of an op, how many bytes it sends to other ranks.
        formulas: by the name of an op, FLOPs of products that torch does not count.
    """
    parameters = list(parameters)
    live = _Live([*parameters, *others], workspaces or {}, crossings or {}, formulas or {})
    handles = [
        parameter.register_post_accumulate_grad_hook(live.take_gradient)
        for parameter in parameters
        if parameter.requires_grad
    ]
    try:
        with live:
            loss = forward()
            kept = live.bytes
            loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    return MicroStep(
        live.moments(), kept, live.products, live.traffic, live.launches, live.crossing
    )


class _Live(TorchDispatchMode):
    def __init__(
        self,
        known: Iterable[Tensor],
        workspaces: Workspaces,
        crossings: Crossings,
        formulas: Formulas,
    ) -> None:
        super().__init__()
        self.bytes = self.products = self.traffic = self.launches = self._arrived = 0
        self.crossing = 0.0
        self._workspaces, self._crossings, self._formulas = workspaces, crossings, formulas
        self._most: dict[int, int] = {}  # gradient elements handed over -> most bytes live then
        # Kept, so that no new storage can take the place of a known one.
        self._known = [tensor.untyped_storage() for tensor in known]
        self._seen = {storage._cdata for storage in self._known}

    def take_gradient(self, parameter: Tensor) -> None:
        self._arrived += parameter.numel()
        parameter.grad = None
        self._note(0)

    def moments(self) -> list[tuple[int, int]]:
        """The moments that no other exceeds in both, most bytes first."""
        best: list[tuple[int, int]] = []
        for arrived, live in sorted(self._most.items(), reverse=True):
            if not best or live > best[-1][0]:
                best.append((live, arrived))
        return best[::-1]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._pin_memory.default:
            return args[0].clone()  # fake tensors have none
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        transient, held = self._workspaces[name](*args) if name in self._workspaces else (0, 0)
        self.crossing += self._crossings[name](*args) if name in self._crossings else 0
        new = [tensor for tensor in tree_leaves(out) if self._is_new(tensor)]
        for index, tensor in enumerate(new):
            self._count(tensor.untyped_storage(), held if index == 0 else 0)
        if new or func._schema.is_mutable:
            self.launches += 1
            if func.namespace == "aten" and func._overloadpacket in flop_registry:
                self.products += flop_registry[func._overloadpacket](*args, out_val=out)
            elif name in self._formulas:
                self.products += self._formulas[name](*args, out_val=out)
            else:
                self.traffic += sum(_bytes(x) for x in tree_leaves((args, out)))
        self._note(transient)
        return out

    def _is_new(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._seen

    def _count(self, storage: Any, held: int) -> None:
        if storage._cdata in self._seen:  # two outputs in one
            return
        size = -(-(storage.nbytes() + held) // _BLOCK) * _BLOCK
        self._seen.add(storage._cdata)
        self.bytes += size
        weakref.finalize(storage, self._forget, storage._cdata, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.bytes -= size

    def _note(self, transient: int) -> None:
        before = self._most.get(self._arrived, 0)
        self._most[self._arrived] = max(before, self.bytes + transient)


def _bytes(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0
