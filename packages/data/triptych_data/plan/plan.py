"""Which samples form which pack: a pure function of sources, lengths, seed and position."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from triptych_data.config import DataConfig
from triptych_data.plan.balance import Cost, balanced_order
from triptych_data.plan.mixture import MixSource, Mixture
from triptych_data.plan.packing import Budget, pack_lengths, split_packs
from triptych_data.plan.permutation import permute, stream_key
from triptych_data.plan.pieces import cut_documents

if TYPE_CHECKING:
    from triptych_data.plan.lengths import Lengths  # which imports torch

PLAN_VERSION = 1
"""To be raised whenever the same inputs would give other packs or another order."""

_LEAST_SAMPLES, _MOST_SAMPLES = 8192, 2**17  # in a window by default; the most take 0.1 s to plan
_ENOUGH_PACKS = 6000  # in a window by default: those split at its end are 0.06 % then
_SPLIT = 750  # packs for every one that may be split


class PlanSource(NamedTuple):
    """A source as the plan sees it; global sample ids count through the sources in their order."""

    name: str
    num_samples: int
    fingerprint: str


class PlannedPack(NamedTuple):
    """A pack and its place in the stream of packs."""

    position: int
    """samples of the stream before it"""
    next_position: int
    """the position of the pack after it"""
    samples: np.ndarray
    """(num_docs,) int64, global ids in the order of the documents: of pieces, see `Plan.pieces`"""


class Plan:
    """The endless stream of packs that all ranks share, from any position on at equal cost.

    The run is cut into windows (see `Mixture`); a window's samples are drawn by permutations of
    their sources, packed (`pack_lengths`), and its packs put in an order in which neighbours cost
    alike (`balanced_order`), so that rank r of N takes pack r of each next N. Nothing is kept from
    one window to the next. A position is the number of samples of the stream before a pack.
    Samples that no pack can hold, and refused ones (0 tokens), are left out, but count. A document
    longer than a pack counts as so many samples as it has `pieces`; where there is none, a piece is
    a sample, and their ids are the same.

    `lengths` are those of all samples of all sources, by global id, and become those of the pieces;
    `processor` is the fingerprint of what they were measured with.
    """

    def __init__(
        self,
        config: DataConfig,
        sources: Sequence[PlanSource],
        lengths: "Lengths",
        processor: str = "",
    ) -> None:
        assert [source.name for source in sources] == list(config.named_sources)
        assert sum(source.num_samples for source in sources) == len(lengths.num_tokens)
        self.config = config
        self.pieces, self.lengths = cut_documents(lengths, config.seq_len)
        ends = np.cumsum([0, *(source.num_samples for source in sources)])
        self._first_ids = self.pieces.starts[ends]
        counts = np.diff(self._first_ids).tolist()
        self.sources = tuple(
            source._replace(num_samples=count)
            for source, count in zip(sources, counts, strict=True)
        )
        self.window = config.window or _default_window(config, self.lengths.num_tokens)
        self._processor = processor
        self._cost = Cost(**config.cost.model_dump())
        self.mixture = Mixture(
            [self._mix_source(i, source) for i, source in enumerate(self.sources)],
            window=self.window,
            temperature=config.temperature,
            in_tokens=config.weights_in == "tokens",
        )

    def packs(self, position: int = 0) -> Iterator[PlannedPack]:
        """Yield the packs of the stream from `position` on, without end.

        Raises ValueError if no pack begins there, and when every source has done its `epochs`.
        """
        window = self.mixture.window_at(position)
        packs = self.window_packs(window)
        first = next((i for i, pack in enumerate(packs) if pack.position == position), len(packs))
        if first == len(packs) and position != self.mixture.start(window):
            raise ValueError(
                f"checkpoint data state: position must be where a pack begins, got {position}; "
                "the checkpoint is of another run, or was changed"
            )
        yield from packs[first:]
        while True:
            window += 1
            yield from self.window_packs(window)

    def next_begin(self, position: int) -> int:
        """Return where the first pack begins that holds no sample before `position`: the place to
        go on from when another plan stopped at `position`."""
        window = self.mixture.window_at(position)
        begins = [pack.position for pack in self.window_packs(window)]
        begins.append(self.mixture.start(window + 1))
        return next(begin for begin in begins if begin >= position)

    def window_packs(self, window: int) -> list[PlannedPack]:
        """Return the packs of a window in the order of the stream.

        Raises ValueError if every source has done its `epochs` before it.
        """
        samples = self._fitting(self._drawn(window))
        if not len(samples):
            return []
        packs = pack_lengths(
            self.lengths.num_tokens[samples],
            self.config.seq_len,
            [Budget(column[samples], limit) for column, limit in self._budgets()],
        )
        # Else steps would begin anywhere in a run of alike packs from the second window on.
        packs = split_packs(packs, _affordable(len(packs), self.config.balance_group))
        ids = samples[packs.items]
        order = self._order(np.add.reduceat(self.costs(ids), packs.starts[:-1]), window)
        begin, end = self.mixture.start(window), self.mixture.start(window + 1)
        ends = (begin + np.cumsum(np.diff(packs.starts)[order])).tolist()
        ends[-1] = end  # so that samples left out count
        spans = zip(packs.starts[order].tolist(), packs.starts[order + 1].tolist(), strict=True)
        return [
            PlannedPack(position, next_position, ids[first:last])
            for position, next_position, (first, last) in zip(
                [begin, *ends[:-1]], ends, spans, strict=True
            )
        ]

    def costs(self, samples: np.ndarray) -> np.ndarray:
        """Return what samples cost to compute, int64 of the shape of their ids (see `Cost`)."""
        lengths = self.lengths
        return self._cost.of_samples(
            lengths.num_tokens[samples],
            lengths.num_patches[samples],
            lengths.patch_pairs[samples],
            lengths.num_targets[samples],
            lengths.audio_frames[samples],
        )

    def epoch(self, position: int) -> int:
        """Return the epoch, from 0, of the pack at `position` (see `Mixture.epoch`)."""
        return self.mixture.epoch(position)

    def fingerprint(self) -> dict[str, Any]:
        """Return everything that the stream depends on, by name and ready for JSON; a position
        means the same in two plans if these are equal."""
        config = self.config
        return {
            **{f"data of source {s.name}": s.fingerprint for s in self.sources},
            "sources": [s.name for s in self.sources],
            **{
                f"data.sources.{name}": source.model_dump(mode="json", exclude={"shards"})
                for name, source in config.named_sources.items()
            },
            "processor": self._processor,
            "plan": PLAN_VERSION,
            "data.temperature": config.temperature,
            "data.weights_in": config.weights_in,
            "data.seed": config.seed,
            "data.seq_len": config.seq_len,
            "data.window": config.window,  # null follows from the rest
            "data.max_patches": config.max_patches,
            "data.max_images": config.max_images,
            "data.cost": config.cost.stated(),
            "data.balance_group": config.balance_group,
        }

    def _drawn(self, window: int) -> np.ndarray:
        """Return the ids of all samples of a window, those of several sources in mixed order."""
        if self.mixture.num_windows is not None and window >= self.mixture.num_windows:
            raise ValueError(
                "data.sources: must last as long as the run, got all of them exhausted after "
                f"{self.mixture.start(window)} samples; raise or drop an epochs"
            )
        counts = zip(self.mixture.counts(window), self.mixture.counts(window + 1), strict=True)
        ids = np.concatenate([self._draw(i, *span) for i, span in enumerate(counts)])
        if len(self.sources) == 1:
            return ids
        # Else packing would put equally long samples of one source together.
        key = stream_key(self.config.seed, "order of sources", window)
        return ids[permute(np.arange(len(ids)), len(ids), key)] if len(ids) else ids

    def _draw(self, source: int, first: int, last: int) -> np.ndarray:
        """Return the global ids of a source's samples number first to last - 1 of the run."""
        name, size, _ = self.sources[source]
        numbers = np.arange(first, last)
        epochs = numbers // size
        key = stream_key(self.config.seed, "order of samples", name)
        one = not len(numbers) or epochs[0] == epochs[-1]
        order = permute(numbers % size, size, key, first // size if one else epochs)
        return order + self._first_ids[source]

    def _budgets(self) -> list[tuple[np.ndarray, int]]:
        bounds = (
            (self.lengths.num_patches, self.config.max_patches),
            (self.lengths.num_images, self.config.max_images),
        )
        return [(column, limit) for column, limit in bounds if limit is not None]

    def _fitting(self, samples: np.ndarray) -> np.ndarray:
        """Return the samples that a pack can hold."""
        tokens = self.lengths.num_tokens[samples]
        fits = (tokens > 0) & (tokens <= self.config.seq_len)
        for column, limit in self._budgets():
            fits &= column[samples] <= limit
        return samples[fits]

    def _order(self, costs: np.ndarray, window: int) -> np.ndarray:
        key = stream_key(self.config.seed, "order of packs", window)
        return balanced_order(costs, self.config.balance_group, key)

    def _mix_source(self, number: int, source: PlanSource) -> MixSource:
        wished = self.config.named_sources[source.name]
        first, last = self._first_ids[number : number + 2]
        return MixSource(
            source.name,
            source.num_samples,
            wished.weights,
            wished.repeat,
            wished.epochs,
            _mean(self.lengths.num_tokens[first:last]),
        )


def _default_window(config: DataConfig, num_tokens: np.ndarray) -> int:
    """Return the samples that make enough packs, as 8192 times a power of two.

    A window mixes what it holds, so with weights it stays small against the passes over a source.
    """
    window, mean = _LEAST_SAMPLES, _mean(num_tokens)
    weighted = config.temperature is not None or any(
        source.weight is not None for source in config.named_sources.values()
    )
    most = min(_MOST_SAMPLES, len(num_tokens) // 8) if weighted else _MOST_SAMPLES
    while 2 * window <= most and window * mean < _ENOUGH_PACKS * config.seq_len:
        window *= 2
    return window


def _affordable(num_packs: int, group: int) -> int:
    """Return the power of two, at most `group`, to whose multiple the packs of a window may be
    split: 0.07 % of padding at most, on average, against steps of up to so many ranks that take
    packs of two blocks."""
    return min(group, 1 << (1 + num_packs // _SPLIT).bit_length() - 1)


def _mean(numbers: np.ndarray) -> float:
    """Return the mean with one rounding, so that it is the same on every machine."""
    return int(numbers.sum(dtype=np.int64)) / len(numbers)
