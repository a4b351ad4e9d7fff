"""Bytes that our ZeRO-1, 2 and 3 need: what engine/division.py does, walked through on sizes alone.

With n ranks, weights of w bytes, and P elements in buckets once each weight is padded to 128 and
each bucket to 128 n of them:

    weights    w (P + frozen); under ZeRO-3, whose frozen weights are in buckets, too, an n-th of it
    gathered   w a bucket of a layer, of two layers at a time or the last ones that max_live allows,
                                      and of what is in no layer; under ZeRO-3 alone
    masters    4 P / n, none of their own where weights are fp32: they are then the weights' parts
    states     their bytes an element, P / n
    gradients  own parts  k P / n     kept until the update; k = 4, or those of `reduce_dtype` where
                                      a window is one micro-step
               sums       s a bucket  from its first gradient to its last; under ZeRO-1 with several
                                      micro-steps all of them, s = 4, else s = r
               in flight  r (1 + 1/n) a bucket, of at most two, and one more while it is sent
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from triptych_core.config import EngineConfig
from triptych_core.engine.buckets import BUCKET, IN_FLIGHT, first_kept, lay_out, split_sizes

Sizes = Mapping[int, int]  # elements of a group's parameters, by when their gradients come
Cut = tuple[Sizes, int]  # and how many ranks cut them
Layers = Mapping[int, int]  # of what ZeRO-3 gathers with a layer, by when its gradient comes


@dataclass(frozen=True, eq=False)
class Bucket:
    """Parameters, by when their gradients come, and elements with padding."""

    members: tuple[int, ...]
    numel: int
    ranks: int  # that cut it
    layer: int | None = None  # with which ZeRO-3 gathers it

    @property
    def part(self) -> int:
        """Elements of a rank's part."""
        return self.numel // self.ranks


@dataclass(frozen=True)
class Widths:
    """Bytes an element of what is summed up, what crosses ranks, and what is kept of it."""

    sums: int
    sent: int
    kept: int


def buckets_of(
    groups: Sequence[Cut], bucket_size: int, layers: Layers | None = None
) -> list[Bucket]:
    """The buckets of groups, in the order in which they are sent; of `layers` undivided."""
    found = []
    for sizes, ranks in groups:
        for layer, places in _by_layer(sizes, layers or {}).items():
            numels = [sizes[place] for place in places]
            most = min(BUCKET, bucket_size) if layer is None else sum(numels)
            for some in split_sizes(numels, most):
                members, numel = tuple(places[some]), lay_out(numels[some], ranks)[1]
                found.append(Bucket(members, numel, ranks, layer))
    return sorted(found, key=lambda bucket: bucket.members[-1])


def gathered_elements(buckets: Sequence[Bucket], max_live: int) -> int:
    """The most that are whole at a time under ZeRO-3: what engine/gathering.py does."""
    outside, layers = _by_gather(buckets)
    kept = sum(layers[first_kept(outside, layers, max_live) :])
    return outside + max([kept, *map(sum, pairwise(layers))])


def received_elements(
    trained: Sequence[Bucket], frozen: Sequence[Bucket], max_live: int, micro_steps: int
) -> float:
    """What a rank receives of the others' weights under ZeRO-3 in a step: engine/gathering.py.

    What is in no layer comes once a step; a layer before its forward and its backward of every
    micro-step, or before the forward alone if it is kept, or if nothing up to it trains.
    """
    buckets = [*trained, *frozen]
    outside, layers = _by_gather(buckets)
    kept = first_kept(outside, layers, max_live)
    begins = min((b.layer for b in trained if b.layer is not None), default=len(layers))
    received = 0.0
    for bucket in buckets:
        times = 1
        if bucket.layer is not None:
            times = micro_steps * (2 if begins <= bucket.layer < kept else 1)
        received += times * bucket.numel * (bucket.ranks - 1) / bucket.ranks
    return received


def _by_gather(buckets: Sequence[Bucket]) -> tuple[int, list[int]]:
    """Elements that are gathered in no layer, and with each."""
    whole: dict[int | None, int] = {}
    for bucket in buckets:
        if bucket.ranks > 1:
            whole[bucket.layer] = whole.get(bucket.layer, 0) + bucket.numel
    outside = whole.pop(None, 0)
    last = max((number for number in whole if number is not None), default=-1)
    return outside, [whole.get(number, 0) for number in range(last + 1)]


def _by_layer(sizes: Sizes, layers: Layers) -> dict[int | None, list[int]]:
    found: dict[int | None, list[int]] = {}
    for place in sorted(sizes):
        found.setdefault(layers.get(place), []).append(place)
    return found


def widths(engine: EngineConfig, stage: int) -> Widths:
    """As the engine's configuration says."""
    low, several = engine.precision == "bf16", engine.gradient_accumulation_steps > 1
    sent = 2 if low and engine.reduce_dtype == "bf16" else 4
    return Widths(4 if stage == 1 and several else sent, sent, 4 if several else sent)


def gradient_bytes(
    groups: Sequence[Cut], engine: EngineConfig, *, stage: int, layers: Layers | None = None
) -> list[tuple[int, int]]:
    """(gradient elements that have come, most bytes of gradients up to then), of the last backward.

    Of a window of several micro-steps, what earlier ones have left is there from the start.
    """
    buckets = buckets_of(groups, engine.zero.bucket_size, layers)
    numels = {place: numel for sizes, _ in groups for place, numel in sizes.items()}
    total = sum(bucket.numel for bucket in buckets)
    wide, several = widths(engine, stage), engine.gradient_accumulation_steps > 1
    has_sums, has_own = several and stage == 1, several and stage > 1
    own = sum(bucket.part for bucket in buckets)
    held = (wide.sums * total if has_sums else 0) + (wide.kept * own if has_own else 0)
    found, arrived, most = [(0, held)], 0, held
    flights: deque[Bucket] = deque()
    for place, starts, ends in _events(buckets):
        arrived += numels[place]
        held += sum(0 if has_sums else wide.sums * bucket.numel for bucket in starts)
        most = max(most, held)
        for bucket in ends:
            copy = wide.sent * bucket.numel if wide.sent != wide.sums else 0
            part = wide.sent * bucket.part if bucket.ranks > 1 else 0
            most = max(most, held + copy)
            held += copy + part - (wide.sums * bucket.numel if copy else 0)
            most = max(most, held)
            flights.append(bucket)
            if len(flights) > IN_FLIGHT:
                held += _landed(flights.popleft(), wide, has_own)
        found.append((arrived, most))
    return found


def _landed(bucket: Bucket, wide: Widths, has_own: bool) -> int:
    """How much more is held once a bucket has arrived."""
    own = 0 if has_own else wide.kept * bucket.part
    sent = bucket.numel + (bucket.part if bucket.ranks > 1 else 0)
    return own - wide.sent * sent


def _events(buckets: Sequence[Bucket]) -> Iterator[tuple[int, list[Bucket], list[Bucket]]]:
    """Gradient by gradient: its place, the buckets it begins, and those it ends."""
    starts: dict[int, list[Bucket]] = {}
    ends: dict[int, list[Bucket]] = {}
    for bucket in buckets:
        starts.setdefault(bucket.members[0], []).append(bucket)
        ends.setdefault(bucket.members[-1], []).append(bucket)
    for place in sorted(place for bucket in buckets for place in bucket.members):
        yield place, starts.get(place, []), ends.get(place, [])
