"""What a rank of ZeRO-1, 2 or 3 holds: parts of masters, states and gradients, weights or theirs.

Rajbhandari et al., ZeRO, arXiv 1910.02054. Weights lie end to end in buckets, which the ranks cut
evenly between them. A bucket's gradients are summed over ranks into the part of each while the
backward pass still runs. Its weights are gathered from all parts after the update; under ZeRO-3
whenever a layer needs them (see gathering).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from triptych_core.engine.buckets import BUCKET, IN_FLIGHT
from triptych_core.engine.cut_weights import (
    CutWeights,
    lay_by_layer,
    layer_numbers,
)
from triptych_core.engine.gathering import Gathering
from triptych_core.optim.adamw import AdamW
from triptych_core.optim.clipping import total_norm
from triptych_core.optim.shards import Flat, even_flat
from triptych_core.sections import EngineConfig


@dataclass(eq=False)
class _Bucket:
    """Parameters of one optimizer group that the same ranks hold, end to end."""

    weights: CutWeights
    master: Tensor  # fp32, of this rank's part
    sums: Tensor | None = None  # (size,) this rank's gradients, while they come
    filled: set[nn.Parameter] = field(default_factory=set)  # those in sums
    missing: set[nn.Parameter] = field(default_factory=set)  # in this micro-step
    gradient: Tensor | None = None  # of the own part, over all ranks

    def empty_sums(self, dtype: torch.dtype) -> Tensor:
        """A tensor like the weights: zeros between parameters, nothing yet in their places."""
        begins, whole = self.weights.begins, self.weights.whole
        sums = torch.empty_like(whole, dtype=dtype)
        ends = [begin + parameter.numel() for parameter, begin in begins.items()]
        for end, begin in zip(ends, [*begins.values(), whole.numel()][1:], strict=True):
            if begin > end:
                sums[end:begin].zero_()
        return sums


@dataclass(eq=False)
class _Flight:
    """A bucket's gradients on their way; `sent` must live until they have arrived."""

    bucket: _Bucket
    sent: Tensor
    part: Tensor
    work: Any  # None where one rank alone has the bucket


class Division:
    """A master for this rank's part of each bucket: in fp32, or the weights' own part where fp32.

    Gradients are summed over ranks once a window under ZeRO-1, every micro-step under ZeRO-2 and 3,
    which then keep only their part of them; over micro-steps always in fp32.

    Args:
        model: alike on every rank, on its device but under ZeRO-3; its parameters become views of
            the buckets.
        optimizer: over the model's parameters; its groups get the masters in their place.
        config: stage, precision, accumulation and `reduce_dtype`.
        layers: of the model, in the order in which they run, each a bucket under ZeRO-3.
        device: of this rank.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: AdamW,
        config: EngineConfig,
        layers: Sequence[nn.Module],
        device: torch.device,
    ) -> None:
        # Gradients come about in the reverse of the order in which weights were made.
        order = {p: i for i, p in enumerate(reversed(list(model.parameters())))}
        cuts = config.stage == 3
        lay = partial(
            lay_by_layer,
            numbers=layer_numbers(layers, config.zero.persistence_threshold) if cuts else {},
            size=min(BUCKET, config.zero.bucket_size),
            device=device,
            cuts=cuts,
        )
        buckets, laid = [], []
        for group in optimizer.param_groups:
            found = lay(sorted(group["params"], key=order.__getitem__))
            # The part itself where it is fp32 already.
            mine = [_Bucket(weights, weights.part.to(torch.float32)) for _, weights in found]
            group["params"] = [bucket.master for bucket in mine]
            buckets += mine
            laid += found
        self._buckets = sorted(buckets, key=lambda b: max(order[p] for p in b.weights.begins))
        frozen = lay([p for p in order if not p.requires_grad]) if cuts else []
        self._frozen = [weights for _, weights in frozen]
        self._gathering = (
            Gathering(model, layers, [*laid, *frozen], config.zero.max_live) if cuts else None
        )
        # A bucket is sent once its last gradient is there and the bucket before it is sent: in the
        # same order on every rank. From the second backward on it is that of the first.
        self._order = self._buckets
        self._backwards = 0
        self._whole: list[_Bucket] = []  # in the first backward, as they became so
        self._bucket_of = {p: bucket for bucket in self._buckets for p in bucket.weights.begins}
        optimizer.attach(
            {b.master: b.weights.part for b in buckets if b.weights.part is not b.master}
        )
        low = any(b.weights.part is not b.master for b in buckets)
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
            yield even_flat(bucket.master, bucket.weights.begins, bucket.weights.group)

    def frozen(self) -> Iterable[Flat]:
        """This rank's parts of weights that do not train, where they are cut, and those in them."""
        for weights in self._frozen:
            yield even_flat(weights.part, weights.begins, weights.group)

    @contextmanager
    def backward(self, *, is_first: bool, is_last: bool) -> Iterator[None]:
        """While a backward runs, of which is said where in the window it stands."""
        self._expect(is_first=is_first, is_last=is_last)
        if self._gathering is None:
            yield
            return
        with self._gathering.backward(is_last=is_last):
            yield

    def _expect(self, *, is_first: bool, is_last: bool) -> None:
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
            bucket.missing = set(bucket.weights.begins)

    def gradients(self) -> Mapping[Tensor, Tensor]:
        """By master, after the window's last backward; zeros where none came."""
        self._finish()
        return {b.master: b.gradient for b in self._buckets if b.gradient is not None}

    def norm(self, gradients: Mapping[Tensor, Tensor]) -> Tensor:
        """The 2-norm of these, alike on every rank, () fp32: no element is on two ranks."""
        square = total_norm(list(gradients.values())).square()
        dist.all_reduce(square)
        return square.sqrt()

    def spread(self) -> None:
        """Give every rank the weights that the others have updated, and forget the gradients."""
        for bucket in self._buckets:
            bucket.gradient = None
        self._renew_weights()

    def refresh(self) -> None:
        """Make the weights those of the masters, after these were changed from outside."""
        for bucket in self._buckets:
            if bucket.weights.part is not bucket.master:
                bucket.weights.part.copy_(bucket.master)
        self._renew_weights()

    def whole(self, by_master: Mapping[Tensor, Tensor]) -> dict[nn.Parameter, Tensor]:
        """Tensors like some of the masters, put together by parameter; every rank takes part."""
        found: dict[nn.Parameter, Tensor] = {}
        for bucket in (each for each in self._buckets if each.master in by_master):
            part = by_master[bucket.master].contiguous()
            flat = torch.empty(bucket.weights.whole.numel(), dtype=part.dtype, device=part.device)
            dist.all_gather_into_tensor(flat, part, group=bucket.weights.group)
            found |= {p: bucket.weights.view(flat, p) for p in bucket.weights.begins}
        return found

    def remove(self) -> None:
        """Let go of the hooks in the model."""
        for hook in self._hooks:
            hook.remove()
        if self._gathering is not None:
            self._gathering.remove()

    @torch.no_grad()
    def _take(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter) and parameter.grad is not None
        bucket = self._bucket_of[parameter]
        if bucket.sums is None:
            bucket.sums = bucket.empty_sums(self._sums_dtype)
        place = bucket.weights.view(bucket.sums, parameter)
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
        places = torch.tensor(mine, device=self._buckets[0].master.device)
        dist.broadcast(places, src=0)
        pairs = zip(places.tolist(), self._buckets, strict=True)
        self._order = [bucket for _, bucket in sorted(pairs, key=lambda pair: pair[0])]

    def _send_next(self) -> None:
        bucket = self._order[self._next]
        self._next += 1
        if bucket.sums is None:
            bucket.sums = bucket.empty_sums(self._sums_dtype)
        for parameter in bucket.weights.begins.keys() - bucket.filled:
            bucket.weights.view(bucket.sums, parameter).zero_()
        sent = bucket.sums.to(self._reduce_dtype)
        bucket.sums, bucket.filled = None, set()
        part, work = sent, None
        if part.numel() > bucket.master.numel():
            part = torch.empty_like(bucket.master, dtype=sent.dtype)
            work = dist.reduce_scatter_tensor(part, sent, group=bucket.weights.group, async_op=True)
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

    def _renew_weights(self) -> None:
        """Have what every rank holds be what the parts are now."""
        if self._gathering is not None:
            self._gathering.free()
            return
        # In the order of the forward pass.
        held = [bucket.weights for bucket in reversed(self._order)]
        works: list[Any] = [
            dist.all_gather_into_tensor(each.whole, each.part, group=each.group, async_op=True)
            for each in held
            if each.is_divided
        ]
        for work in works:
            work.wait()
