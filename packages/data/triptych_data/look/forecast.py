"""What shards become under a model: tokens, full packs, and ranks that wait for each other."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from triptych_data.config import DataConfig
from triptych_data.look.survey import spread
from triptych_data.plan.lengths import Lengths, Progress, check_refused, sample_lengths
from triptych_data.plan.permutation import permute, stream_key
from triptych_data.plan.plan import Plan, PlannedPack, PlanSource
from triptych_data.processor import Processor
from triptych_data.shards.reader import Shards


class Forecast(NamedTuple):
    """One epoch of packs as the planner of training makes it."""

    lengths: Lengths
    fills: np.ndarray
    """(P,) float64, share of each pack that is no padding, in the order of training"""
    costs: np.ndarray
    """(P,) float64, what each pack costs to compute, the mean being 1"""
    report: dict[str, Any]
    """for people and JSON"""


def forecast(
    shards: Shards,
    sources: Sequence[PlanSource],
    config: DataConfig,
    processor: Processor,
    *,
    ranks: int = 8,
    progress: Progress | None = None,
) -> Forecast:
    """What one epoch of the sources becomes: tokens, targets, packs of `config.seq_len`.

    `shards` are those of all sources, as `loader.open_sources` returns them. Measures every sample
    once and keeps the lengths beside the shards. `imbalance` is how much longer than the mean the
    slowest of `ranks` ranks computes, and what it would be with packs in random order. Raises
    ValueError if no sample fits.
    """
    lengths = sample_lengths(shards, processor, progress=progress)
    plan = Plan(config, sources, lengths)
    lengths = plan.lengths  # of the pieces of documents, where they are cut
    packs = [pack.samples for pack in _one_epoch(plan, len(plan.pieces))]
    if not packs:
        raise ValueError(
            f"data.shards: must hold samples of at most data.seq_len={config.seq_len} tokens, got "
            f"{len(lengths.num_tokens)} samples and none that fits; raise data.seq_len"
        )
    starts = np.cumsum([0, *map(len, packs[:-1])])
    samples = np.concatenate(packs)
    tokens = np.add.reduceat(lengths.num_tokens[samples].astype(np.int64), starts)
    costs = np.add.reduceat(plan.costs(samples).astype(np.float64), starts)
    seq_len, refused = config.seq_len, int((lengths.num_tokens == 0).sum())
    report = {
        "tokens": spread(lengths.num_tokens),
        "targets": spread(lengths.num_targets),
        "patches": spread(lengths.num_patches),
        "packing": {
            "seq_len": seq_len,
            "num_packs": len(packs),
            "samples_per_pack": round(len(samples) / len(packs), 2),
            "fill": round(int(tokens.sum()) / (len(packs) * seq_len), 4),
            "target_share": round(int(lengths.num_targets[samples].sum()) / int(tokens.sum()), 4),
            "documents_cut": _num_cut(plan),
            "too_long": int(_too_long(config, lengths).sum()),
            "refused": refused,
            "refused_first": _first_refused(shards, lengths, processor),
        },
        "balance": {
            "ranks": ranks,
            "imbalance": imbalance(costs, ranks),
            "imbalance_at_random": imbalance(_at_random(costs), ranks),
        },
    }
    return Forecast(lengths, tokens / seq_len, costs / costs.mean(), report)


def _num_cut(plan: Plan) -> int:
    """How many documents are longer than a pack."""
    return int((np.diff(plan.pieces.starts) > 1).sum())


def _one_epoch(plan: Plan, num_samples: int) -> Iterator[PlannedPack]:
    """The packs of as many samples as there are, or all if the sources are exhausted before."""
    last = plan.mixture.num_windows
    end = num_samples if last is None else min(num_samples, plan.mixture.start(last))
    window = 0
    while last is None or window < last:
        if plan.mixture.start(window) >= end:
            return
        for pack in plan.window_packs(window):
            if pack.position < end and len(pack.samples):
                yield pack
        window += 1


def _too_long(config: DataConfig, lengths: Lengths) -> np.ndarray:
    """Which samples no pack can hold, (N,) bool."""
    long = lengths.num_tokens > config.seq_len
    if config.max_patches is not None:
        long |= lengths.num_patches > config.max_patches
    if config.max_images is not None:
        long |= lengths.num_images > config.max_images
    return long


def imbalance(costs: np.ndarray, ranks: int) -> float | None:
    """Time of all steps over the time that ranks of equal load would take; None below one step.

    Rank r of N takes pack r of each next N packs, and every step lasts as long as its dearest.
    """
    steps = costs[: len(costs) // ranks * ranks].reshape(-1, ranks)
    if not len(steps):
        return None
    return round(float(steps.max(axis=1).sum() / steps.mean(axis=1).sum()), 4)


def _at_random(costs: np.ndarray) -> np.ndarray:
    return costs[permute(np.arange(len(costs)), len(costs), stream_key(0, "imbalance"))]


def _first_refused(shards: Shards, lengths: Lengths, processor: Processor) -> str | None:
    """What the processor says of the first sample that it refuses."""
    try:
        check_refused(shards, lengths, processor, max_bad_rate=0.0)
    except ValueError as error:
        return " ".join(str(error).split())
    return None
