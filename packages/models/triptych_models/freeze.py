"""Parts of a model by name: which parameters they hold, and switching their training off."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from torch import nn


class Holder(Protocol):
    """A module, or what else holds parameters."""

    def parameters(self) -> Iterable[nn.Parameter]: ...
    def requires_grad_(self, requires_grad: bool) -> Any: ...


class HasParts(Protocol):
    """A family: an nn.Module that names its parts."""

    def parts(self) -> Mapping[str, Sequence[Holder]]: ...


class OwnParameters:
    """The parameters that a module holds itself, where those of modules are asked for."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def parameters(self) -> list[nn.Parameter]:
        """Without those of its children."""
        return list(self._module.parameters(recurse=False))

    def requires_grad_(self, requires_grad: bool) -> None:
        """As of a module."""
        for parameter in self.parameters():
            parameter.requires_grad_(requires_grad)


def freeze(model: HasParts, parts: Iterable[str]) -> None:
    """Let the named parts keep their weights; ValueError for a part the model does not have.

    A part with nothing trainable before it then leaves no autograd graph.
    """
    known = model.parts()
    for part in parts:
        if part not in known:
            raise ValueError(
                f"model.freeze: parts must be among {sorted(known)}, got {part!r}; correct the name"
            )
        for module in known[part]:
            module.requires_grad_(False)


def parameter_parts(model: HasParts) -> dict[str, str]:
    """Part of each parameter, by the name `model.named_parameters()` gives it."""
    assert isinstance(model, nn.Module)
    part_of = {
        id(parameter): part
        for part, modules in model.parts().items()
        for module in modules
        for parameter in module.parameters()
    }
    return {name: part_of[id(parameter)] for name, parameter in model.named_parameters()}


def count_parameters(model: HasParts) -> dict[str, int]:
    """Number of parameters of each part, of all ranks also where this one has only shards."""
    assert isinstance(model, nn.Module)
    part_of = parameter_parts(model)
    counts = dict.fromkeys(model.parts(), 0)
    for name, parameter in model.named_parameters():
        _, num_parts = getattr(parameter, "expert_part", (0, 1))
        numel = getattr(parameter, "ds_numel", parameter.numel())
        numel = getattr(parameter, "num_weights", numel)  # of those in four bits
        counts[part_of[name]] += numel * num_parts
    return counts
