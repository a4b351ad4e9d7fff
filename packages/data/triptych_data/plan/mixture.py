"""How many samples every source has given at any point of a run: closed form, in exact integers."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

_BITS = 32  # counts are kept in 2**-32 samples: exact integers, the same on every machine
_TOTAL = 2**32  # what the shares of weighted sources add up to

Counts = tuple[int, ...]
"""Of each source, in 2**-32 samples."""


class MixSource(NamedTuple):
    """One source as mixing sees it: a size, and what is wished of it."""

    name: str
    num_samples: int
    weights: Sequence[tuple[int, float]] | None = None
    """(point of the run, weight) in ascending order; None: all samples `repeat` times an epoch"""
    repeat: float = 1.0
    epochs: float | None = None
    """passes over the source after which it gives nothing more"""
    mean_tokens: float = 1.0


class _Line(NamedTuple):
    """A stretch of the run in which the sources' shares are straight lines."""

    counts: Counts
    """given before it"""
    first: tuple[int, ...]
    """shares at its start …"""
    last: tuple[int, ...]
    """… and at its end"""
    length: int | None
    """samples; None: without end, and then the shares stay"""

    def counts_after(self, samples: int) -> Counts:
        """Return what each source has given after so many samples of the line."""
        return tuple(self.count_after(source, samples) for source in range(len(self.counts)))

    def count_after(self, source: int, samples: int) -> int:
        """Return what one source has given then."""
        length = self.length or 1
        a, b = self.first[source], self.last[source]
        given = ((2 * a * length + (b - a) * samples) * samples << _BITS) // (
            2 * length * self.total
        )
        return self.counts[source] + given

    @property
    def total(self) -> int:
        """What the shares add up to."""
        return sum(self.first)


class _Piece(NamedTuple):
    """A part of a line, from its start or from where the piece before it ended, cut in windows."""

    line: _Line
    offset: int
    """samples of the line before it"""
    period: int
    """samples"""
    windows: int
    """equal ones in each period"""
    periods: int | None
    """None: without end"""
    first_window: int
    first_epoch: int


class Mixture:
    """Sources in proportion to their size, by weights, or by weights that change during the run.

    A run goes through windows 0, 1, … of about `window` samples. Without weights there are epochs,
    in which each source gives all its samples `repeat` times, and which end together with a window.
    With weights, or with size**(1 / temperature) as weights, a source that has given all its
    samples begins anew while others go on. Between two points of weights that change, shares change
    linearly. `in_tokens`: weights are shares of tokens instead of samples, points count tokens.
    A source that has done its `epochs` leaves its share to the others, in proportion to theirs.

    Raises ValueError if no source has anything to give.
    """

    def __init__(
        self,
        sources: Sequence[MixSource],
        *,
        window: int,
        temperature: float | None = None,
        in_tokens: bool = False,
    ) -> None:
        assert sources and window > 0 and all(source.num_samples > 0 for source in sources)
        self.sources = tuple(sources)
        self.has_epochs = temperature is None and sources[0].weights is None
        self._window = window
        self._tokens = [s.mean_tokens for s in sources] if in_tokens else None
        self._caps = [
            None if s.epochs is None else max(1, round(s.epochs * s.num_samples)) for s in sources
        ]
        self._pieces = list(self._cut(_stages(sources, temperature)))
        if not self._pieces:
            raise ValueError(
                "data.sources: at least one must have a positive weight at the start of the run, "
                f"got none of {[source.name for source in sources]}; raise a weight"
            )

    @property
    def num_windows(self) -> int | None:
        """Windows until no source has anything left to give; None if there is always one."""
        last = self._pieces[-1]
        return None if last.periods is None else last.first_window + last.windows * last.periods

    def counts(self, window: int) -> list[int]:
        """Return the samples that each source has given before `window`; they never decrease."""
        piece, period, turn = self._locate(window)
        within = period * piece.period + turn * piece.period // piece.windows
        half = 1 << (_BITS - 1)
        rounded = [n + half >> _BITS for n in piece.line.counts_after(piece.offset + within)]
        return [
            n if cap is None else min(n, cap) for n, cap in zip(rounded, self._caps, strict=True)
        ]

    def start(self, window: int) -> int:
        """Return the samples that all sources together have given before `window`."""
        return sum(self.counts(window))

    def window_at(self, position: int) -> int:
        """Return the window that holds sample number `position` of the run, or the number of
        windows if the run ends before it."""
        bound = self.num_windows
        if bound is None:
            bound = 2 + position // self._window
            while self.start(bound) <= position:
                bound *= 2
        return bisect_right(range(bound + 1), position, key=self.start) - 1

    def epoch(self, position: int) -> int:
        """Return the epoch, from 0, of sample number `position`; with weights, how often as many
        samples as all sources hold were given before it."""
        if not self.has_epochs:
            return position // sum(source.num_samples for source in self.sources)
        piece, period, _ = self._locate(self.window_at(position))
        return piece.first_epoch + period

    def _locate(self, window: int) -> tuple[_Piece, int, int]:
        """Return the piece that `window` is in, its period there, and its number in the period."""
        assert window >= 0 and (self.num_windows is None or window <= self.num_windows)
        at = bisect_right(self._pieces, window, key=lambda piece: piece.first_window) - 1
        piece = self._pieces[at]
        return piece, *divmod(window - piece.first_window, piece.windows)

    def _cut(self, stages: Sequence["_Stage"]) -> Iterator[_Piece]:
        """Yield the pieces of the run: they end with a stage, or when a source is exhausted."""
        window = epoch = 0
        counts: Counts = (0,) * len(self.sources)
        for left, first, last in stages:
            while left is None or left > 0:
                line = self._line(counts, left, first, last)
                if line is None:
                    return
                used = self._used(line)
                for piece in self._parts(line, used, window, epoch):
                    yield piece
                    if piece.periods is None:
                        return
                    window += piece.windows * piece.periods
                    epoch += piece.periods
                assert used is not None
                counts = self._bounded(line.counts_after(used))
                if left is not None and line.length is not None:
                    done = used / line.length
                    first = [a + (b - a) * done for a, b in zip(first, last, strict=True)]
                    left -= left * used // line.length

    def _line(
        self, counts: Counts, left: int | None, first: list[float], last: list[float]
    ) -> _Line | None:
        """Return the line over what is `left` of a stage; None if no source can give anything."""
        a, b = self._shares(counts, first, last), self._shares(counts, last, first)
        if not sum(a):
            return None
        if left is not None and self._tokens is not None:
            # The mean of tokens per sample is a line as well, so that its middle counts.
            middle = sum((x + y) * n for x, y, n in zip(a, b, self._tokens, strict=True))
            left = max(1, round(left * 2 * sum(a) / middle))
        return _Line(counts, a, b, left)

    def _shares(
        self, counts: Counts, weights: list[float], otherwise: list[float]
    ) -> tuple[int, ...]:
        """Return integers in proportion to the weights of the sources that are not exhausted; by
        the other weights if these are all zero."""
        active = [c is None or n < c << _BITS for n, c in zip(counts, self._caps, strict=True)]
        wished = [w if on else 0 for w, on in zip(weights, active, strict=True)]
        if not any(wished):
            wished = [w if on else 0 for w, on in zip(otherwise, active, strict=True)]
        if self.has_epochs or not any(wished):
            return tuple(int(w) for w in wished)
        if self._tokens is not None:
            wished = [w / n for w, n in zip(wished, self._tokens, strict=True)]
        total = sum(wished)
        shares = [round(w / total * _TOTAL) for w in wished]
        shares[shares.index(max(shares))] += _TOTAL - sum(shares)
        return tuple(shares)

    def _used(self, line: _Line) -> int | None:
        """Return the samples of a line until its end or the first source that gets exhausted."""
        ends = [] if line.length is None else [line.length]
        for i, cap in enumerate(self._caps):
            if cap is None or line.counts[i] >= cap << _BITS or not line.first[i] + line.last[i]:
                continue
            bound = line.length
            if bound is None:  # the last samples come at a steady rate
                missing = (cap << _BITS) - line.counts[i]
                bound = missing * line.total // (line.first[i] << _BITS) + 1
            reached = bisect_left(range(bound + 1), cap << _BITS, key=partial(line.count_after, i))
            if reached <= bound:
                ends.append(reached)
        return min(ends, default=None)

    def _parts(self, line: _Line, used: int | None, window: int, epoch: int) -> Iterator[_Piece]:
        """Yield the used part of a line as whole epochs and a rest, or as one period."""
        whole = line.total if self.has_epochs else self._window
        if used is None:
            parts: list[tuple[int, int | None]] = [(whole, None)]
        elif self.has_epochs:
            parts = [(whole, used // whole), (used % whole, 1)]
        else:
            parts = [(used, 1)]
        offset = 0
        for period, periods in parts:
            if period == 0 or periods == 0:
                continue
            windows = max(1, (2 * period + self._window) // (2 * self._window))
            yield _Piece(line, offset, period, windows, periods, window, epoch)
            if periods is not None:
                offset += period * periods
                window += windows * periods
                epoch += periods

    def _bounded(self, counts: Counts) -> Counts:
        caps = zip(counts, self._caps, strict=True)
        return tuple(n if cap is None else min(n, cap << _BITS) for n, cap in caps)


class _Stage(NamedTuple):
    span: int | None
    """samples or tokens; None: without end"""
    first: list[float]
    last: list[float]


def _stages(sources: Sequence[MixSource], temperature: float | None) -> list[_Stage]:
    """Return the run as stages between which no source's weights have a point."""
    if temperature is not None:
        steady = [(s.num_samples * s.repeat) ** (1 / temperature) for s in sources]
        return [_Stage(None, steady, steady)]
    if sources[0].weights is None:
        quotas: list[float] = [max(1, round(s.num_samples * s.repeat)) for s in sources]
        return [_Stage(None, quotas, quotas)]
    points = sorted({0, *(at for s in sources for at, _ in s.weights or ())})
    weights = [[_interpolated(s.weights or (), at) for s in sources] for at in points]
    stages = [
        _Stage(end - begin, weights[i], weights[i + 1])
        for i, (begin, end) in enumerate(pairwise(points))
    ]
    return [*stages, _Stage(None, weights[-1], weights[-1])]


def _interpolated(weights: Sequence[tuple[int, float]], at: int) -> float:
    """Return the weight at a point: linear between the given ones, the nearest one beyond them."""
    after = bisect_right(weights, at, key=lambda point: point[0])
    if after in (0, len(weights)):
        return float(weights[max(0, after - 1)][1])
    (left, low), (right, high) = weights[after - 1 : after + 1]
    return low + (high - low) * (at - left) / (right - left)
