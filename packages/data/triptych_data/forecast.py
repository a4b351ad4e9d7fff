"""What shards become under a model: tokens, full packs, and ranks that wait for each other."""

from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np

from triptych_data.balance import Cost
from triptych_data.config import DataConfig
from triptych_data.lengths import Lengths, Progress, check_refused, fitting_samples, sample_lengths
from triptych_data.permutation import permute, stream_key
from triptych_data.plan import Plan, PlanSource
from triptych_data.processor import Processor
from triptych_data.reader import Shards
from triptych_data.survey import spread


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
    model: str,
    seq_len: int,
    *,
    ranks: int = 8,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    progress: Progress | None = None,
) -> Forecast:
    """What the samples become under the model folder `model`: tokens, targets, packs of `seq_len`.

    Measures every sample once and keeps the lengths beside the shards. `imbalance` is how much
    longer than the mean the slowest of `ranks` ranks computes, and what it would be with packs in
    random order. Raises ValueError if no sample fits.
    """
    processor = Processor.from_directory(model, min_pixels=min_pixels, max_pixels=max_pixels)
    lengths = sample_lengths(shards, processor, progress=progress)
    fitting = fitting_samples(shards, lengths, seq_len, None, skip_long=True)
    config = DataConfig(shards=[str(path) for path in shards.paths], seq_len=seq_len)
    source = PlanSource("shards", shards.num_samples, shards.fingerprint)
    plan = Plan(config, [source], lengths)
    one_epoch = takewhile(lambda pack: pack.position < shards.num_samples, plan.packs())
    packs = [pack.samples for pack in one_epoch if len(pack.samples)]
    starts = np.cumsum([0, *map(len, packs[:-1])])
    samples = np.concatenate(packs)
    tokens = np.add.reduceat(lengths.num_tokens[samples].astype(np.int64), starts)
    costs = np.add.reduceat(sample_costs(config, lengths)[samples].astype(np.float64), starts)
    refused = int((lengths.num_tokens == 0).sum())
    report = {
        "tokens": spread(lengths.num_tokens),
        "targets": spread(lengths.num_targets),
        "patches": spread(lengths.num_patches),
        "packing": {
            "seq_len": seq_len,
            "num_packs": len(packs),
            "samples_per_pack": round(len(fitting) / len(packs), 2),
            "fill": round(int(tokens.sum()) / (len(packs) * seq_len), 4),
            "target_share": round(int(lengths.num_targets[fitting].sum()) / int(tokens.sum()), 4),
            "too_long": shards.num_samples - len(fitting) - refused,
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


def sample_costs(config: DataConfig, lengths: Lengths) -> np.ndarray:
    """What each sample costs to compute, (N,) int64, in the planner's units."""
    cost = Cost(config.cost.linear, config.cost.vision, config.cost.vision_linear)
    return cost.of_samples(lengths.num_tokens, lengths.num_patches, lengths.patch_pairs)


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
