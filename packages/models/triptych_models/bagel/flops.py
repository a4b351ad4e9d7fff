"""FLOPs of a Bagel, as triptych_models.flops counts them."""

from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from ..diffusion.sit import FREQUENCIES
from ..flops import Work, tower_blocks, with_backward
from ..layout import head_dim
from .config import BagelConfig


def bagel_flops(
    config: BagelConfig,
    batch: Mapping[str, Any],
    trainable: Collection[str],
    *,
    adapted: bool = False,
) -> float:
    """Forward + backward FLOPs of a batch, its shapes on the host; see flops.qwen3_vl_flops.

    Attention counts the pairs of the row's segments; without them, those of causal documents. Of
    sparse attention those of its three branches, to within a block, whatever a backend computes.
    """
    grids: list[tuple[int, ...]] = [
        (int(t), int(h), int(w)) for t, h, w in _rows(batch.get("image_grid_thw"))
    ]
    patches = sum(t * h * w for t, h, w in grids)
    drawn = sum(int(h) * int(w) for h, w in _rows(batch.get("latent_grids")))
    bounds = [int(x) for x in batch["cu_seqlens"]]
    reads, draws = "language" in trainable, "generation" in trainable
    sees, projects, anything = "vision" in trainable, "projector" in trainable, bool(trainable)

    vision, wide = config.vit_config, config.llm_config.hidden_size
    patch_dim = vision.num_channels * vision.patch_size**2
    embed = Work(2.0 * patch_dim * vision.hidden_size * patches, 0.0)
    blocks = tower_blocks(
        vision.hidden_size, vision.intermediate_size, config.num_vit_blocks, grids
    )
    first = Work(2.0 * vision.hidden_size * wide * patches, 0.0)
    second = Work(2.0 * wide * wide * patches, 0.0)
    # Latents and times need no gradients.
    entry = Work(2.0 * (config.latent_dim + FREQUENCIES) * wide * drawn, 0.0)
    times = Work(2.0 * wide * wide * drawn, 0.0)
    exit_ = Work(2.0 * wide * config.latent_dim * drawn, 0.0)
    text = Work(_layer_weights(config) * 2.0 * (bounds[-1] - drawn), 0.0)
    latents = Work(_layer_weights(config) * 2.0 * drawn, 0.0)
    q_dim = config.llm_config.num_attention_heads * head_dim(config.llm_config)
    layers = config.llm_config.num_hidden_layers
    pairs = Work(0.0, 4.0 * q_dim * layers * _pairs(batch, bounds, config.sparse_attention))
    head = Work(2.0 * wide * config.llm_config.vocab_size * int(batch["num_targets"]), 0.0)
    return (
        with_backward(embed, weight=sees and not adapted, inputs=False)
        + with_backward(blocks, weight=sees and not adapted, inputs=sees)
        + with_backward(first, weight=projects and not adapted, inputs=sees)
        + with_backward(second, weight=projects and not adapted, inputs=sees or projects)
        + with_backward(entry, weight=draws and not adapted, inputs=False)
        + with_backward(times, weight=draws and not adapted, inputs=draws)
        + with_backward(exit_, weight=draws and not adapted, inputs=anything)
        + with_backward(text, weight=reads and not adapted, inputs=anything)
        + with_backward(latents, weight=draws and not adapted, inputs=anything)
        + with_backward(pairs, weight=anything, inputs=anything)
        + with_backward(head, weight=reads and not adapted, inputs=anything)
    )


def _layer_weights(config: BagelConfig) -> float:
    """Of one expert, over all layers."""
    text = config.llm_config
    size = head_dim(text)
    heads = 2 * (text.num_attention_heads + text.num_key_value_heads) * size
    heads += 0 if config.sparse_attention is None else 3 * text.num_attention_heads
    per_layer = text.hidden_size * (heads + 3 * text.intermediate_size)
    return float(text.num_hidden_layers * per_layer)


def _pairs(
    batch: Mapping[str, Any], bounds: Sequence[int], sparse: Mapping[str, int] | None
) -> int:
    """Of a query and a key that it sees, or is to look at."""
    causal, mutual = [bounds, bounds], [[0], [0]]
    if "causal_bounds" in batch:
        causal, mutual = (batch[f"{kind}_bounds"].tolist() for kind in ("causal", "mutual"))
    counts = [np.arange(seen - n, seen) + 1 for n, seen in zip(*map(_lengths, causal), strict=True)]
    counts += [np.full(n, seen) for n, seen in zip(*map(_lengths, mutual), strict=True)]
    seen = np.concatenate([np.zeros(0, dtype=np.int64), *counts])
    if sparse is None:
        return int(seen.sum())
    block, chosen = sparse["block_size"], sparse["block_size"] * sparse["num_selected"]
    reach = np.minimum(seen, sparse["window"])
    return int((seen // block + np.minimum(seen, chosen) + reach).sum())


def _lengths(bounds: Sequence[int]) -> list[int]:
    return [stop - start for start, stop in pairwise(bounds)]


def _rows(grids: Any) -> Any:
    return [] if grids is None else grids
