"""What a mixture will feed a run: of each source its share, samples, tokens and epochs."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from triptych_data.config import DataConfig
from triptych_data.plan.lengths import Progress, sample_lengths
from triptych_data.plan.mixture import MixSource, Mixture
from triptych_data.plan.pieces import cut_documents
from triptych_data.processor import Processor
from triptych_data.shards.reader import Shards
from triptych_data.stage_config import open_processor

POINTS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where in the run shares are shown: weights may change."""
WINDOW = 64
"""Samples between which shares count as constant: finer than what is packed together."""


class Source(NamedTuple):
    """A source with what is known of its samples; tokens only under a model."""

    name: str
    num_samples: int
    num_tokens: int | None


def mix_report(
    config: DataConfig,
    *,
    model: str | None = None,
    num_samples: int | None = None,
    num_tokens: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """What the sources of `config` give a run of `num_samples`, or about `num_tokens`.

    By default the run is one epoch: as many samples as all sources hold. Tokens are known under a
    `model`, a Hugging Face folder. Raises ValueError when tokens are asked for without it.
    """
    if model is None and (num_tokens is not None or config.weights_in == "tokens"):
        raise ValueError(
            "--model: must be given to count tokens, got none; name a Hugging Face model folder"
        )
    processor = None
    if model is not None:
        processor = open_processor(model, config)
    sources = [
        _measured(name, Shards.open(source.shards), processor, config.seq_len, progress)
        for name, source in config.named_sources.items()
    ]
    mixture = Mixture(
        [_mix_source(config, source) for source in sources],
        window=WINDOW,
        temperature=config.temperature,
        in_tokens=config.weights_in == "tokens",
    )
    means = np.array([source.num_tokens or 0 for source in sources]) / [
        source.num_samples for source in sources
    ]
    total = num_samples or sum(source.num_samples for source in sources)
    if num_tokens is not None:
        total = _samples_of(mixture, means, num_tokens)
    total = min(total, _last(mixture) or total)
    return _report(mixture, sources, means if model else None, total)


def _measured(
    name: str,
    shards: Shards,
    processor: Processor | None,
    seq_len: int,
    progress: Progress | None,
) -> Source:
    if processor is None:
        return Source(name, shards.num_samples, None)
    lengths = sample_lengths(shards, processor, progress=progress)
    pieces, cut = cut_documents(lengths, seq_len)
    return Source(name, len(pieces), int(cut.num_tokens.sum()))


def _mix_source(config: DataConfig, source: Source) -> MixSource:
    wished = config.named_sources[source.name]
    mean = (source.num_tokens or source.num_samples) / source.num_samples
    return MixSource(
        source.name, source.num_samples, wished.weights, wished.repeat, wished.epochs, mean
    )


def _report(
    mixture: Mixture, sources: Sequence[Source], means: np.ndarray | None, total: int
) -> dict[str, Any]:
    given = counts_at(mixture, total)
    shares = [_shares_at(mixture, round(point * total), total) for point in POINTS]
    rows = []
    for number, source in enumerate(sources):
        row: dict[str, Any] = {
            "source": source.name,
            "size_samples": source.num_samples,
            "samples": round(given[number]),
            "share": round(float(given[number] / given.sum()), 4),
            "epochs": round(float(given[number] / source.num_samples), 3),
            "share_over_the_run": [round(float(share[number]), 4) for share in shares],
        }
        if means is not None:
            row["size_tokens"] = source.num_tokens
            row["tokens"] = round(given[number] * means[number])
            row["token_share"] = round(float(given[number] * means[number] / (given @ means)), 4)
        rows.append(row)
    return {
        "samples": total,
        "tokens": None if means is None else round(float(given @ means)),
        "ends_after_samples": _last(mixture),
        "points": list(POINTS),
        "sources": rows,
    }


def counts_at(mixture: Mixture, position: int) -> np.ndarray:
    """Samples (num_sources,) float64 that each source has given before `position` of the run."""
    if position >= (_last(mixture) or position + 1):
        return np.array(mixture.counts(mixture.num_windows or 0), dtype=np.float64)
    window = mixture.window_at(position)
    before, after = (np.array(mixture.counts(w), dtype=np.float64) for w in (window, window + 1))
    done = (position - before.sum()) / (after.sum() - before.sum())
    return before + done * (after - before)


def _shares_at(mixture: Mixture, position: int, total: int) -> np.ndarray:
    """Shares of the samples around `position`, over a twentieth of the run."""
    begin = max(0, min(position - total // 40, total - total // 20 - 1))
    given = counts_at(mixture, min(total, begin + total // 20 + 1)) - counts_at(mixture, begin)
    return given / given.sum()


def _samples_of(mixture: Mixture, means: np.ndarray, num_tokens: int) -> int:
    """How many samples hold about `num_tokens`; fewer, if the sources are exhausted before."""
    low, high = 1, _last(mixture) or 2
    while _last(mixture) is None and counts_at(mixture, high) @ means < num_tokens:
        low, high = high, 2 * high
    while low < high:
        middle = (low + high) // 2
        if counts_at(mixture, middle) @ means < num_tokens:
            low = middle + 1
        else:
            high = middle
    return low


def _last(mixture: Mixture) -> int | None:
    """After how many samples all sources are exhausted; None: never."""
    return None if mixture.num_windows is None else mixture.start(mixture.num_windows)
