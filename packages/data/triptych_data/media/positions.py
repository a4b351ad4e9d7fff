"""M-RoPE positions of one document: text counts on, an image spans its grid."""

import numpy as np


def mrope_positions(is_image: np.ndarray, grids: np.ndarray, merge_size: int) -> np.ndarray:
    """Return (3, L) int64 positions (t, h, w) as transformers' Qwen3-VL `get_rope_index` does.

    `is_image (L,) bool` marks image tokens; `grids (num_images, 3)` are the patch grids of the
    images in order. Text tokens have three equal positions; an image's begin at the next position
    on every axis, and text goes on after the image's longer side.
    """
    steps = np.ones(len(is_image), dtype=np.int64)  # how far each token moves the next one
    steps[is_image] = 0
    image_tokens = np.flatnonzero(is_image)
    sizes = grids // np.array([1, merge_size, merge_size])
    ends = np.cumsum(sizes.prod(axis=1)) if len(grids) else np.zeros(0, dtype=np.int64)
    assert len(image_tokens) == (ends[-1] if len(ends) else 0), "one token per merged patch"
    steps[image_tokens[ends - 1]] = sizes[:, 1:].max(axis=1) if len(grids) else 0
    positions = np.tile(np.cumsum(steps) - steps, (3, 1))
    for (frames, height, width), end in zip(sizes, ends, strict=True):
        tokens = image_tokens[end - frames * height * width : end]
        positions[:, tokens] = positions[0, tokens[0]] + np.indices(
            (frames, height, width)
        ).reshape(3, -1)
    return positions
