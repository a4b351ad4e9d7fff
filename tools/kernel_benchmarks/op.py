"""What a benchmark consists of: inputs of a shape, the functions that compete, the work they do."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

Shape = SimpleNamespace  # the op's dims by name, and `ignored`, the share of ignored labels
Call = Callable[..., Any]  # (*tensors, **constants) -> a tensor or a tuple of tensors


class Unavailable(Exception):
    """This provider does not exist here; the message says why."""


class Work(NamedTuple):
    """The least that the formula needs: elements through memory, floating-point operations."""

    elements: float
    flops: float = 0.0


class Inputs(NamedTuple):
    tensors: list[Tensor]  # the differentiable ones
    constants: dict[str, Any]  # the others, given by keyword


@dataclass(frozen=True)
class Draw:
    """Random tensors of one dtype on one device, the same for every provider."""

    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator

    def randn(self, *shape: int, scale: float = 1.0) -> Tensor:
        x = torch.randn(shape, generator=self.generator, device=self.device, dtype=self.dtype)
        return x.mul_(scale)

    def rand(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device)

    def randint(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator, device=self.device)


@dataclass(frozen=True)
class Op:
    """One benchmark. `providers` are resolved when their turn comes, and may raise Unavailable.

    The provider "compile" is made from the one that `compiled` names. `backward` is None for an op
    that has no gradient.
    """

    dims: tuple[str, ...]
    shapes: Sequence[tuple[int, ...]]
    tiny: tuple[int, ...]  # for the rehearsal on a CPU
    inputs: Callable[[Shape, Draw], Inputs]
    providers: dict[str, Callable[[], Call]]
    forward: Callable[[Shape], Work]
    backward: Callable[[Shape], Work] | None
    compiled: str = "eager"
    cuda_only: frozenset[str] = field(default=frozenset({"liger", "quack"}))
    floors: frozenset[str] = frozenset()  # providers that do only a part of the op, as a bound

    def work(self, shape: Shape, mode: str) -> Work:
        forward = self.forward(shape)
        if mode == "fwd" or self.backward is None:
            return forward
        backward = self.backward(shape)
        if mode == "bwd":
            return backward
        return Work(forward.elements + backward.elements, forward.flops + backward.flops)


def found(module: str, name: str) -> Any:
    """`module.name`. Raises Unavailable when the module or the name is not there."""
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise Unavailable(f"not available: {error}") from error
    except AttributeError as error:
        raise Unavailable(f"not available: {module} has no {name}") from error


def ours(name: str) -> Callable[[], Call]:
    return lambda: found("triptych_kernels", name)
