"""FLOPs of Wan's transformer, counted as those of all families: products alone."""

from typing import Any


def wan_flops(config: Any, tokens: int, text: int, images: int = 0) -> float:
    """Forward and backward of one sample of so many tokens, text tokens and image tokens.

    What is given, latents, texts and images, needs no gradient: the first products have one
    backward product, all others two.
    """
    width = config.num_attention_heads * config.attention_head_dim
    patch = 1
    for side in config.patch_size:
        patch *= side
    first = tokens * config.in_channels * patch * width
    first += text * config.text_dim * width + config.freq_dim * width
    inner = text * width**2 + 7 * width**2  # text, time, and the six of its projection
    if images:
        inner += images * (config.image_dim**2 + config.image_dim * width)
    block = 4 * tokens * width**2 + 2 * tokens * width**2 + 2 * text * width**2
    block += 2 * tokens * width * config.ffn_dim
    attention = 2 * tokens**2 * width + 2 * tokens * text * width
    if images and config.added_kv_proj_dim is not None:
        block += 2 * images * config.added_kv_proj_dim * width
        attention += 2 * tokens * images * width
    last = tokens * width * config.out_channels * patch
    products = inner + config.num_layers * block + last
    return 2.0 * (2 * first + 3 * products + 3 * config.num_layers * attention)
