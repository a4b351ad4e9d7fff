"""A picture of what shards hold: distributions of texts, media, tokens and packs."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from triptych_data.look.forecast import Forecast
from triptych_data.sample import KINDS
from triptych_data.shards.reader import Shards

COLORS = ("#2a6fdb", "#1a936f", "#c2571a", "#7a3fc4")
"""Four hues that stay apart for all kinds of colour vision, and in print."""
BINS = 48


def plot(shards: Shards, path: Path, forecast: Forecast | None = None) -> None:
    """Write a picture to `path`, in the format of its suffix.

    Raises ValueError when matplotlib is missing or does not know the suffix.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            f"{path}: matplotlib must be installed to plot, got {error}; "
            "run: pip install 'triptych-data[plot]'"
        ) from error
    panels = _panels(shards, forecast)
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(11, 3.2 * rows), layout="constrained")
    grid = figure.add_gridspec(rows, 2)
    for i, draw in enumerate(panels):
        alone = i + 1 == len(panels) and i % 2 == 0
        axes = figure.add_subplot(grid[i // 2, :] if alone else grid[i // 2, i % 2])
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
    media = ", ".join(
        f"{count:,} {kind}s"
        for kind, count in zip(KINDS, shards.media.counts(), strict=True)
        if count
    )
    figure.suptitle(f"{shards.num_samples:,} samples{f', {media}' if media else ''}")
    try:
        figure.savefig(path, dpi=130)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; name a .png, .svg or .pdf") from error


def _panels(shards: Shards, forecast: Forecast | None) -> list[Callable[[Any], None]]:
    media, panels = shards.media, list[Callable[[Any], None]]()
    panels.append(lambda axes: _lengths(axes, shards.text_bytes, "text of a sample, bytes"))
    images = media.kind == KINDS.index("image")
    if images.any():
        panels.append(lambda axes: _sizes(axes, media.size[images]))
    for kind in ("video", "audio"):
        chosen = media.kind == KINDS.index(kind)
        if chosen.any():
            title = f"length of {kind}, seconds"
            panels.append(partial(_lengths, values=media.seconds[chosen], title=title))
    if forecast:
        tokens = forecast.lengths.num_tokens
        panels += [
            lambda axes: _lengths(axes, tokens, "tokens of a sample", forecast.lengths.num_targets),
            lambda axes: _fills(axes, forecast.fills),
            lambda axes: _costs(axes, forecast.costs),
        ]
    return panels


def _lengths(axes: Any, values: np.ndarray, title: str, inner: np.ndarray | None = None) -> None:
    """A histogram with a logarithmic axis; `inner` is drawn into it, for targets."""
    positive = values[values > 0]
    if not len(positive):
        positive = np.ones(1)
    low, high = float(positive.min()), float(positive.max())
    bins = np.geomspace(low, max(high, low * 1.5), BINS)
    axes.hist(positive, bins, color=COLORS[0], alpha=0.75, label="tokens")
    if inner is not None:
        axes.hist(inner[inner > 0], bins, color=COLORS[1], alpha=0.75, label="of these targets")
        axes.legend(frameon=False, loc="upper right")
    axes.set(xscale="log", title=title, ylabel="samples")
    median, high_end = np.percentile(values, [50, 99])
    axes.set_xlabel(f"median {median:,.5g}, 99 % below {high_end:,.5g}")


def _sizes(axes: Any, sizes: np.ndarray) -> None:
    """Widths against heights; darker where there are more images."""
    limit = float(sizes.max()) * 1.05
    bins = np.linspace(0, limit, BINS)
    counts = axes.hist2d(*sizes.T, bins=[bins, bins], cmap="Blues", cmin=1)[3]
    axes.plot([0, limit], [0, limit], color="0.6", linewidth=0.8)
    axes.set(title="image size, pixels", xlabel="width", ylabel="height")
    axes.figure.colorbar(counts, ax=axes, label="images", shrink=0.9)


def _fills(axes: Any, fills: np.ndarray) -> None:
    axes.hist(100 * fills, BINS, color=COLORS[2])
    axes.set(title=f"how full packs are: {fills.mean():.2%} on average", xlabel="%", ylabel="packs")


def _costs(axes: Any, costs: np.ndarray) -> None:
    axes.plot(costs, ".", markersize=2.5, color=COLORS[3])
    axes.set(title="cost of packs in the order of training, mean 1", xlabel="pack", ylim=(0, None))
