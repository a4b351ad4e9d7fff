"""Gradients summed over micro-steps and ranks, while the backward pass still runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from triptych_core.engine.buckets import BUCKET, split_sizes
from triptych_core.parallel.expert import replicas_of


@dataclass
class _Bucket:
    flat: Tensor
    places: dict[nn.Parameter, Tensor]  # views of flat, in the parameters' shapes
    group: Any  # of the ranks it is summed over; None for all
    missing: set[nn.Parameter] = field(default_factory=set)  # in this micro-step
    sent: Tensor | None = None  # what crosses ranks, while it does
    work: Any = None


class GradientSums:
    """Sums of gradients in flat buckets, each reduced as soon as its last gradient is there.

    Args:
        parameters: in the order in which their gradients are expected, alike on every rank. Parts
            of experts are summed over the ranks that hold the same.
        reduce_dtype: in which sums cross ranks. With one micro-step they are kept in it, else in
            fp32.
        micro_steps: of a window.
        bucket: elements of a bucket, about.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        reduce_dtype: torch.dtype,
        micro_steps: int,
        bucket: int = BUCKET,
    ) -> None:
        self._reduce_dtype = reduce_dtype
        kept = torch.float32 if micro_steps > 1 else reduce_dtype
        self._buckets = [_make(some, kept) for some in split_parameters(parameters, bucket)]
        self._bucket_of = {p: each for each in self._buckets for p in each.places}
        self._summed: set[nn.Parameter] = set()  # those with a gradient in this window
        self._next = 0  # the bucket to be reduced: the same order on every rank
        self._is_last = self._is_done = False
        self._hooks = [p.register_post_accumulate_grad_hook(self._take) for p in parameters]

    def expect(self, *, is_first: bool, is_last: bool) -> None:
        """Say, before each backward, where in the window it stands."""
        if is_first:
            self._summed.clear()
            self._next, self._is_done = 0, False
        self._is_last = is_last
        for bucket in self._buckets:
            bucket.missing = set(bucket.places)

    @torch.no_grad()
    def finish(self) -> Mapping[nn.Parameter, Tensor]:
        """The window's sums over ranks, after its last backward; zeros where no gradient came."""
        if not self._is_done:
            for parameter in self._bucket_of.keys() - self._summed:
                self._bucket_of[parameter].places[parameter].zero_()
            self._reduce_from_next(len(self._buckets))
            for bucket in self._buckets:
                _await(bucket)
            self._is_done = True
        return {p: bucket.places[p] for p, bucket in self._bucket_of.items()}

    def remove(self) -> None:
        """Take the hooks out of the model."""
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def _take(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter) and parameter.grad is not None
        bucket = self._bucket_of[parameter]
        if parameter in self._summed:
            bucket.places[parameter].add_(parameter.grad)
        else:
            bucket.places[parameter].copy_(parameter.grad)
            self._summed.add(parameter)
        parameter.grad = None
        bucket.missing.discard(parameter)
        if self._is_last:
            ready = self._next
            while ready < len(self._buckets) and not self._buckets[ready].missing:
                ready += 1
            self._reduce_from_next(ready)

    def _reduce_from_next(self, end: int) -> None:
        for bucket in self._buckets[self._next : end]:
            if dist.get_world_size(bucket.group) > 1:
                bucket.sent = bucket.flat.to(self._reduce_dtype)
                bucket.work = dist.all_reduce(bucket.sent, group=bucket.group, async_op=True)
        self._next = end


def split_parameters(parameters: Iterable[nn.Parameter], size: int) -> Iterator[list[nn.Parameter]]:
    """Neighbours of one dtype that the same ranks hold, up to the first that makes `size`."""
    for _, alike in groupby(parameters, key=lambda p: (p.dtype, id(replicas_of(p)))):
        some = list(alike)
        for chosen in split_sizes([p.numel() for p in some], size):
            yield some[chosen]


def _await(bucket: _Bucket) -> None:
    if bucket.work is not None:
        bucket.work.wait()
        assert bucket.sent is not None
        if bucket.sent is not bucket.flat:
            bucket.flat.copy_(bucket.sent)
        bucket.work = bucket.sent = None


def _make(parameters: Sequence[nn.Parameter], dtype: torch.dtype) -> _Bucket:
    flat = torch.empty(sum(p.numel() for p in parameters), dtype=dtype, device=parameters[0].device)
    pieces = flat.split([p.numel() for p in parameters])
    places = {p: piece.view(p.shape) for p, piece in zip(parameters, pieces, strict=True)}
    return _Bucket(flat, places, replicas_of(parameters[0]))
