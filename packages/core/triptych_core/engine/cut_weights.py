"""Weights that ranks have cut between them, and that are whole only while something uses them.

A parameter stays a view of its flat tensor all the time; what comes and goes is the memory behind
that. So whatever autograd has kept of a weight in the forward pass is there again once the weight
is, and a shape, a dtype or a number of elements can be asked of it at any time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from triptych_core.engine.buckets import lay_out
from triptych_core.engine.gradient_sums import split_parameters
from triptych_core.parallel.expert import replicas_of

_NAME = "cut_weights"  # a parameter's attribute: the CutWeights that it is in


@dataclass(eq=False)
class CutWeights:
    """Parameters end to end, which the ranks of a group cut evenly between them."""

    begins: dict[nn.Parameter, int]
    whole: Tensor  # (size,), what the parameters are views of; without memory while it is freed
    part: Tensor  # this rank's, a tensor of its own where the whole may be freed
    group: Any  # the ranks that cut it
    work: Any = None  # while the whole is on its way

    @property
    def is_divided(self) -> bool:
        """Whether there are other parts."""
        return self.whole.numel() > self.part.numel()

    @property
    def is_here(self) -> bool:
        """Whether the whole has memory."""
        return self.whole.untyped_storage().nbytes() > 0

    def view(self, flat: Tensor, parameter: nn.Parameter) -> Tensor:
        """A parameter's place in a tensor like the whole."""
        return flat.narrow(0, self.begins[parameter], parameter.numel()).view(parameter.shape)

    @torch.no_grad()
    def start(self) -> None:
        """Begin to put the whole together, unless it is here; every rank of the group does."""
        if self.is_divided and not self.is_here:
            self.whole.untyped_storage().resize_(self.whole.nbytes)
            self.work = dist.all_gather_into_tensor(
                self.whole, self.part, group=self.group, async_op=True
            )

    def gather(self) -> None:
        """Have the whole here before the device does what it is given next."""
        self.start()
        if self.work is not None:
            self.work.wait()
            self.work = None

    def free(self) -> None:
        """Give back the memory of the whole, once the device has done what it was given so far."""
        if self.is_divided and self.is_here:
            if self.work is not None:
                self.work.wait()
                self.work = None
            self.whole.untyped_storage().resize_(0)

    def cut(self) -> None:
        """Take this rank's part out of the whole, and free that."""
        if self.is_divided:
            self.part = self.part.clone()
            self.free()
        for parameter in self.begins:
            setattr(parameter, _NAME, self)


@torch.no_grad()
def lay_end_to_end(parameters: Sequence[nn.Parameter], device: torch.device) -> CutWeights:
    """Move parameters that the same ranks hold into one tensor on `device`, which stays whole."""
    group = replicas_of(parameters[0]) or dist.group.WORLD
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    places, size = lay_out([p.numel() for p in parameters], num_ranks)
    begins = dict(zip(parameters, places, strict=True))
    whole = torch.zeros(size, dtype=parameters[0].dtype, device=device)
    part = size // num_ranks
    weights = CutWeights(begins, whole, whole[rank * part : (rank + 1) * part], group)
    for parameter in begins:
        place = weights.view(whole, parameter)
        with whole_weights([parameter]):
            place.copy_(parameter.data)
        parameter.data = place
    return weights


def layer_numbers(layers: Iterable[nn.Module], threshold: int) -> dict[nn.Parameter, int]:
    """Of parameters that are gathered with their layer; those of up to `threshold` elements are
    not worth it."""
    return {
        parameter: number
        for number, layer in enumerate(layers)
        for parameter in layer.parameters()
        if parameter.numel() > threshold
    }


def lay_by_layer(
    parameters: Iterable[nn.Parameter],
    numbers: Mapping[nn.Parameter, int],
    size: int,
    device: torch.device,
    *,
    cuts: bool,
) -> list[tuple[int | None, CutWeights]]:
    """What is gathered with a layer, with its number and undivided; the rest by `size`, with None.

    With `cuts` what the first rank has is cut over all.
    """
    by_layer: dict[int | None, list[nn.Parameter]] = {}
    for parameter in parameters:
        by_layer.setdefault(numbers.get(parameter), []).append(parameter)
    found = []
    for number, some in by_layer.items():
        most = size if number is None else sum(p.numel() for p in some)
        for together in split_parameters(some, most):
            weights = lay_end_to_end(together, device)
            if cuts:
                share_out(weights)
            found.append((number, weights))
    return found


@contextmanager
def whole_weights(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """While parameters are whole, for reading only; every rank takes part."""
    held = _held(parameters)
    freed = [each for each in held if not each.is_here]
    for each in held:
        each.gather()
    yield
    for each in freed:
        each.free()


@contextmanager
def edited_weights(parameters: Iterable[nn.Parameter], device: torch.device) -> Iterator[None]:
    """While parameters are whole; what the first rank made of them is cut over ranks then.

    Those that were not cut before are from then on, each by itself, on `device`; every rank takes
    part.
    """
    parameters = list(parameters)
    with whole_weights(parameters):
        yield
        for each in _held(parameters):
            dist.broadcast(each.whole, group=each.group, group_src=0)
            rank = dist.get_rank(each.group)
            each.part.copy_(each.whole.chunk(dist.get_world_size(each.group))[rank])
    for parameter in parameters:
        if not hasattr(parameter, _NAME):
            share_out(lay_end_to_end([parameter], device))


def share_out(weights: CutWeights) -> None:
    """Cut what the first rank has over all of them."""
    if weights.is_divided:
        dist.broadcast(weights.whole, group=weights.group, group_src=0)
    weights.cut()


def _held(parameters: Iterable[nn.Parameter]) -> list[CutWeights]:
    found = (getattr(parameter, _NAME, None) for parameter in parameters)
    return list(dict.fromkeys(each for each in found if each is not None))
