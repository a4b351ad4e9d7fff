"""Measure the plan of packs: speed, padding, balance of ranks by compute cost, time to resume.

    OMP_NUM_THREADS=1 python tools/bench_data_plan.py

Lengths are drawn, none is read: the mixture of `reference_lengths`, at 32k with 5 % documents of
8192 to 32,768 tokens. Speed is samples per CPU second of one core, the median over windows of the
whole path: permutation, look-up of lengths, packing, cost, order. Balance is the cost of the
dearest of 8 ranks over their mean cost, the mean over all steps, each of the next 8 packs.
"""

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import count, takewhile
from typing import Any

import click
import numpy as np

from triptych_data.config import DataConfig
from triptych_data.plan.lengths import Lengths
from triptych_data.plan.permutation import permute, stream_key
from triptych_data.plan.plan import Plan, PlanSource

RANKS = 8
DEPTHS = (0, 10**7, 10**9)


@click.command(help=__doc__)
@click.option("--samples", type=click.IntRange(20_000), default=200_000, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def main(samples: int, as_json: bool) -> None:
    wide: dict[str, Any] = {"linear": 12 * 4096}
    rows = {
        "8k, d 2048": measure(make_plan(samples, 8192)),
        "8k, d 4096": measure(make_plan(samples, 8192, **wide)),
        "8k, d 2048, with vision": measure(make_plan(samples, 8192, vision=0.857)),
        "8k, at most 24,000 patches": measure(make_plan(samples, 8192, max_patches=24_000)),
        "8k, 10 weighted sources": measure(make_plan(samples, 8192, num_sources=10)),
        "32k, 5 % long, d 2048": measure(make_plan(samples, 32_768, share_long=0.05)),
        "32k, 5 % long, d 4096": measure(make_plan(samples, 32_768, share_long=0.05, **wide)),
    }
    plan = make_plan(samples, 8192)
    resume = {depth: resume_seconds(plan, depth) for depth in DEPTHS}
    rate = permutation_rate()
    if as_json:
        print(json.dumps({"plans": rows, "resume_s": resume, "indices_per_s": rate}, indent=2))
        return
    print(f"{'':<26}{'samples/s':>10}{'padding':>10}{'docs/pack':>13}{'balance':>9}{'random':>8}")
    for name, row in rows.items():
        docs = f"{row['docs_mean']:.1f} ± {row['docs_std']:.1f}"
        print(
            f"{name:<26}{row['samples_per_s']:>10,.0f}{row['padding']:>10.3%}{docs:>13}"
            f"{row['balance']:>9.3f}{row['balance_at_random']:>8.3f}"
        )
    times = ", ".join(f"{seconds * 1000:.1f} ms at {depth:,}" for depth, seconds in resume.items())
    print(f"first pack from a position (CPU time): {times}")
    print(f"permutation: {rate / 1e6:.1f} M indices/s, 8192 at a time")


def reference_lengths(samples: int, share_long: float = 0.0, seed: int = 0) -> Lengths:
    """Texts of log-normal length, median 180 tokens; 70 % with 1 to 4 images of 64 to 1296 tokens,
    log-uniform, 4 patches each; a share of documents of 8192 to 32,768 tokens, log-uniform.

    Without these, mean 755 tokens, 99th percentile 2945.
    """
    rng = np.random.default_rng(seed)
    text = np.clip(rng.lognormal(np.log(180), 1, samples), 8, 6000).astype(np.int32)
    num_images = rng.choice(5, samples, p=[0.3, 0.42, 0.175, 0.07, 0.035])
    images = np.exp(rng.uniform(np.log(64), np.log(1296), (samples, 4))).astype(np.int32)
    images *= np.arange(4) < num_images[:, None]
    image_tokens = np.minimum(images.sum(axis=1), 8192 - text)
    long = np.exp(rng.uniform(np.log(8192), np.log(32768), samples)).astype(np.int32)
    is_long = rng.random(samples) < share_long
    tokens = np.where(is_long, long, text + image_tokens)
    patches = np.where(is_long, 0, image_tokens * 4)
    pairs = np.where(is_long, 0, 16 * (images.astype(np.int64) ** 2).sum(axis=1))
    return Lengths(tokens, text, patches, np.where(is_long, 0, num_images), pairs, 0 * tokens)


def make_plan(
    samples: int,
    seq_len: int,
    *,
    share_long: float = 0.0,
    linear: int = 12 * 2048,
    vision: float = 0.0,
    max_patches: int | None = None,
    num_sources: int = 1,
) -> Plan:
    """A plan of the reference mixture, in equal sources with weights 1, 2, … if several."""
    lengths = reference_lengths(samples, share_long)
    names = [f"s{i}" for i in range(num_sources)]
    weights: list[Any] = [None] if num_sources == 1 else list(range(1, num_sources + 1))
    mixed = {n: {"shards": [n], "weight": w} for n, w in zip(names, weights, strict=True)}
    config = DataConfig.model_validate(
        {
            "sources": mixed,
            "seq_len": seq_len,
            "max_patches": max_patches,
            "cost": {"linear": linear, "vision": vision},
        }
    )
    sizes = np.diff(np.linspace(0, samples, num_sources + 1).astype(int)).tolist()
    sources = [PlanSource(n, size, "") for n, size in zip(names, sizes, strict=True)]
    return Plan(config, sources, lengths)


def measure(plan: Plan) -> dict[str, float]:
    """Plan one epoch's number of samples window by window."""
    num_samples = sum(source.num_samples for source in plan.sources)
    rates, packs = [], []
    for window in takewhile(lambda w: plan.mixture.start(w) < num_samples, count()):
        seconds, planned = timed(partial(plan.window_packs, window))
        rates.append(sum(len(pack.samples) for pack in planned) / seconds)
        packs += planned
    costs = np.array([plan.costs(pack.samples).sum() for pack in packs], dtype=np.float64)
    tokens = sum(int(plan.lengths.num_tokens[pack.samples].sum()) for pack in packs)
    docs = [len(pack.samples) for pack in packs]
    return {
        "samples_per_s": statistics.median(rates),
        "padding": 1 - tokens / (len(packs) * plan.config.seq_len),
        "docs_mean": statistics.fmean(docs),
        "docs_std": statistics.pstdev(docs),
        "balance": balance(costs),
        "balance_at_random": balance(np.random.default_rng(0).permutation(costs)),
    }


def balance(costs: np.ndarray) -> float:
    """Cost of the dearest rank over the mean cost, (num_packs,) costs in the order of the run."""
    steps = costs[: len(costs) // RANKS * RANKS].reshape(-1, RANKS)
    return float((steps.max(axis=1) / steps.mean(axis=1)).mean())


def resume_seconds(plan: Plan, depth: int) -> float:
    """CPU seconds to the first pack of the window at `depth`, the median of 9 fresh starts."""
    position = plan.mixture.start(plan.mixture.window_at(depth))
    return statistics.median(timed(lambda: next(plan.packs(position)))[0] for _ in range(9))


def permutation_rate() -> float:
    """Indices of 10 M permuted per CPU second."""
    key = stream_key(0, "bench")
    windows = [np.arange(i * 8192, (i + 1) * 8192) for i in range(50)]
    times = [timed(partial(permute, w, 10_000_019, key, 3))[0] for w in windows]
    return 8192 / statistics.median(times)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.process_time()
    result = work()
    return time.process_time() - begin, result


if __name__ == "__main__":
    main()
