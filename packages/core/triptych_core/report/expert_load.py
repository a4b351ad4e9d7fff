"""How evenly tokens fell on experts, layer by layer, of text and of images apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Load = Sequence[Sequence[float]]  # (sparse layers, experts), tokens


def split_load(figures: Mapping[str, Any]) -> dict[str, Load]:
    """The tables of a step: of all tokens (""), and where it has images "text" and "images"."""
    load, images = figures.get("expert_load"), figures.get("expert_load_images")
    if not load:
        return {}
    if not images:
        return {"": load}
    pairs = [zip(*layers, strict=True) for layers in zip(load, images, strict=True)]
    return {"": load, "text": [[n - m for n, m in each] for each in pairs], "images": images}


def describe_load(figures: Mapping[str, Any]) -> dict[str, list[float]]:
    """`expert_entropy` and `expert_max_share` of each sparse layer, and those of text and images.

    Entropy is of the shares p_e of tokens, -sum p_e ln p_e / ln E: 1 when even, 0 when one expert
    has all, or nothing came.
    """
    found: dict[str, list[float]] = {}
    for kind, load in split_load(figures).items():
        end = f"_{kind}" if kind else ""
        found[f"expert_entropy{end}"] = [entropy(counts) for counts in load]
        found[f"expert_max_share{end}"] = [max_share(counts) for counts in load]
    return found


def entropy(counts: Sequence[float]) -> float:
    """Of the shares of a layer's experts, in units of its largest value."""
    total = sum(counts)
    shares = [count / total for count in counts if count > 0]
    return sum(p * math.log(1 / p) for p in shares) / max(math.log(len(counts)), 1e-9)


def max_share(counts: Sequence[float]) -> float:
    """The busiest expert's share of a layer's tokens."""
    return max(counts) / max(sum(counts), 1)
