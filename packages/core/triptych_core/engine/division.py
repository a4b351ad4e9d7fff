"""What a rank of ZeRO-1 or 2 holds: all weights, and its part of masters, states and gradients.

Rajbhandari et al., ZeRO, arXiv 1910.02054. Weights lie end to end in buckets, which the ranks cut
evenly between them. A bucket's gradients are summed over ranks into the part of each while the
backward pass still runs; after the update its weights are gathered from all parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from triptych_core.engine.buckets import BUCKET, IN_FLIGHT, lay_out
from triptych_core.engine.gradient_sums import split_parameters
from triptych_core.optim.adamw import AdamW
from triptych_core.optim.clipping import total_norm
from triptych_core.optim.shards import Flat, even_flat
from triptych_core.parallel.expert import replicas_of
from triptych_core.sections import EngineConfig


@dataclass(eq=False)
class _Bucket:
    """Parameters of one optimizer group that the same ranks hold, end to end in `weights`."""

    begins: dict[nn.Parameter, int]
    weights: Tensor  # (size,), what the parameters are views of
    own: slice  # this rank's part of it
    master: Tensor  # fp32, of that part
    group: Any  # the ranks that cut it
    sums: Tensor | None = None  # (size,) this rank's gradients, while they come
    filled: set[nn.Parameter] = field(default_factory=set)  # those in sums
    missing: set[nn.Parameter] = field(default_factory=set)  # in this micro-step
    gradient: Tensor | None = None  # of the own part, over all ranks

    def empty_sums(self, dtype: torch.dtype) -> Tensor:
        """A tensor like `weights`: zeros between parameters, nothing yet in their places."""
        sums = torch.empty_like(self.weights, dtype=dtype)
        ends = [begin + parameter.numel() for parameter, begin in self.begins.items()]
        for end, begin in zip(ends, [*self.begins.values(), self.weights.numel()][1:], strict=True):
            if begin > end:
                sums[end:begin].zero_()
        return sums

    def view(self, flat: Tensor, parameter: nn.Parameter) -> Tensor:
        """A parameter's place in a tensor like `weights`."""
        return flat.narrow(0, self.begins[parameter], parameter.numel()).view(parameter.shape)


@dataclass(eq=False)
class _Flight:
    """A bucket's gradients on their way; `sent` must live until they have arrived."""

    bucket: _Bucket
    sent: Tensor
    part: Tensor
    work: Any  # None where one rank alone has the bucket


class Division:
    """A master for this rank's part of each bucket: in fp32, or the weights' own part where fp32.

    Gradients are summed over ranks once a window under ZeRO-1, every micro-step under ZeRO-2, which
    then keeps only its part of them; over micro-steps always in fp32.

    Args:
        model: on its device, alike on every rank; its parameters become views of the buckets.
        optimizer: over the model's parameters; its groups get the masters in their place.
        config: stage, precision, accumulation and `reduce_dtype`.
    """

    def __init__(self, model: nn.Module, optimizer: AdamW, config: EngineConfig) -> None:
        # Gradients come about in the reverse of the order in which weights were made.
        order = {p: i for i, p in enumerate(reversed(list(model.parameters())))}
        size = min(BUCKET, config.zero.bucket_size)
        buckets = []
        for group in optimizer.param_groups:
            parameters = sorted(group["params"], key=order.__getitem__)
            mine = [_make(some) for some in split_parameters(parameters, size)]
            group["params"] = [bucket.master for bucket in mine]
            buckets += mine
        self._buckets = sorted(buckets, key=lambda b: max(order[p] for p in b.begins))
        # A bucket is sent once its last gradient is there and the bucket before it is sent: in the
        # same order on every rank. From the second backward on it is that of the first.
        self._order = self._buckets
        self._backwards = 0
        self._whole: list[_Bucket] = []  # in the first backward, as they became so
        self._bucket_of = {p: bucket for bucket in self._buckets for p in bucket.begins}
        optimizer.attach(
            {b.master: b.weights[b.own] for b in buckets if b.weights.dtype != torch.float32}
        )
        low = any(b.weights.dtype != torch.float32 for b in buckets)
        several = config.gradient_accumulation_steps > 1
        self._reduce_dtype = (
            torch.bfloat16 if low and config.reduce_dtype == "bf16" else torch.float32
        )
        self._kept_dtype = torch.float32 if several else self._reduce_dtype
        self._reduces_once = config.stage == 1 and several
        self._sums_dtype = torch.float32 if self._reduces_once else self._reduce_dtype
        self._next = len(self._order)  # the bucket to be sent
        self._is_last = False
        self._in_flight: list[_Flight] = []
        self._hooks = [p.register_post_accumulate_grad_hook(self._take) for p in self._bucket_of]

    def flats(self) -> Iterable[Flat]:
        """The masters and the parameters in them."""
        for bucket in self._buckets:
            yield even_flat(bucket.master, bucket.begins, bucket.group)

    def expect(self, *, is_first: bool, is_last: bool) -> None:
        """Say, before each backward, where in the window it stands."""
        if is_first:
            for bucket in self._buckets:
                bucket.gradient = None
        elif not self._reduces_once:
            self._finish()
        self._backwards += 1
        if self._backwards == 2:
            self._learn_order()
        self._next, self._is_last = 0, is_last
        for bucket in self._buckets:
            bucket.missing = set(bucket.begins)

    def gradients(self) -> Mapping[Tensor, Tensor]:
        """By master, after the window's last backward; zeros where none came."""
        self._finish()
        return {b.master: b.gradient for b in self._buckets if b.gradient is not None}

    def norm(self, gradients: Mapping[Tensor, Tensor]) -> Tensor:
        """The 2-norm of all gradients, alike on every rank, () fp32: no element is on two ranks."""
        square = total_norm(list(gradients.values())).square()
        dist.all_reduce(square)
        return square.sqrt()

    def spread(self) -> None:
        """Give every rank the weights that the others have updated, and forget the gradients."""
        for bucket in self._buckets:
            bucket.gradient = None
        self._gather_weights()

    def refresh(self) -> None:
        """Make the weights those of the masters, after these were changed from outside."""
        for bucket in self._buckets:
            bucket.weights[bucket.own].copy_(bucket.master)
        self._gather_weights()

    def whole(self, by_master: Mapping[Tensor, Tensor]) -> dict[nn.Parameter, Tensor]:
        """Tensors like some of the masters, put together by parameter; every rank takes part."""
        found: dict[nn.Parameter, Tensor] = {}
        for bucket in (each for each in self._buckets if each.master in by_master):
            part = by_master[bucket.master].contiguous()
            flat = torch.empty(bucket.weights.numel(), dtype=part.dtype, device=part.device)
            dist.all_gather_into_tensor(flat, part, group=bucket.group)
            found |= {p: bucket.view(flat, p) for p in bucket.begins}
        return found

    def remove(self) -> None:
        """Let go of the hooks in the model."""
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def _take(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter) and parameter.grad is not None
        bucket = self._bucket_of[parameter]
        if bucket.sums is None:
            bucket.sums = bucket.empty_sums(self._sums_dtype)
        place = bucket.view(bucket.sums, parameter)
        if parameter in bucket.filled:
            place.add_(parameter.grad)
        else:
            place.copy_(parameter.grad)
            bucket.filled.add(parameter)
        parameter.grad = None
        bucket.missing.discard(parameter)
        if self._backwards == 1 and not bucket.missing:
            self._whole.append(bucket)
        if self._is_last or not self._reduces_once:
            while self._next < len(self._order) and not self._order[self._next].missing:
                self._send_next()

    @torch.no_grad()
    def _finish(self) -> None:
        """Send what is left, with zeros where no gradient came, and wait for all that is sent."""
        while self._next < len(self._order):
            self._send_next()
        while self._in_flight:
            self._land()

    def _learn_order(self) -> None:
        """Take the main rank's: where a gradient comes late, all buckets would wait for its own."""
        place = {bucket: index for index, bucket in enumerate(self._whole)}
        mine = [place.get(bucket, len(place)) for bucket in self._buckets]
        places = torch.tensor(mine, device=self._buckets[0].weights.device)
        dist.broadcast(places, src=0)
        pairs = zip(places.tolist(), self._buckets, strict=True)
        self._order = [bucket for _, bucket in sorted(pairs, key=lambda pair: pair[0])]

    def _send_next(self) -> None:
        bucket = self._order[self._next]
        self._next += 1
        if bucket.sums is None:
            bucket.sums = bucket.empty_sums(self._sums_dtype)
        for parameter in bucket.begins.keys() - bucket.filled:
            bucket.view(bucket.sums, parameter).zero_()
        sent = bucket.sums.to(self._reduce_dtype)
        bucket.sums, bucket.filled = None, set()
        part, work = sent, None
        if part.numel() > bucket.master.numel():
            part = torch.empty_like(bucket.master, dtype=sent.dtype)
            work = dist.reduce_scatter_tensor(part, sent, group=bucket.group, async_op=True)
        self._in_flight.append(_Flight(bucket, sent, part, work))
        if len(self._in_flight) > IN_FLIGHT:
            self._land()

    def _land(self) -> None:
        flight = self._in_flight.pop(0)
        if flight.work is not None:
            flight.work.wait()
        if flight.bucket.gradient is None:
            flight.bucket.gradient = flight.part.to(self._kept_dtype)
        else:
            flight.bucket.gradient.add_(flight.part)

    def _gather_weights(self) -> None:
        # In the order of the forward pass.
        works: list[Any] = [
            dist.all_gather_into_tensor(
                bucket.weights, bucket.weights[bucket.own], group=bucket.group, async_op=True
            )
            for bucket in reversed(self._order)
            if bucket.weights.numel() > bucket.master.numel()
        ]
        for work in works:
            work.wait()


def _make(parameters: Sequence[nn.Parameter]) -> _Bucket:
    """Move parameters, end to end, into one tensor that the ranks which hold them cut evenly."""
    group = replicas_of(parameters[0]) or dist.group.WORLD
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    places, size = lay_out([p.numel() for p in parameters], num_ranks)
    begins = dict(zip(parameters, places, strict=True))
    weights = torch.zeros(size, dtype=parameters[0].dtype, device=parameters[0].device)
    part = size // num_ranks
    own = slice(rank * part, (rank + 1) * part)
    for parameter, begin in begins.items():
        place = weights.narrow(0, begin, parameter.numel()).view(parameter.shape)
        place.copy_(parameter.data)
        parameter.data = place
    # The part itself where it is fp32 already.
    return _Bucket(begins, weights, own, weights[own].to(torch.float32), group)
