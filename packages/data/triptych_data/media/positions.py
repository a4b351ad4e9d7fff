"""M-RoPE positions of one document: text counts on, an image spans its grid."""

from collections.abc import Sequence

import numpy as np


def mrope_positions(
    is_image: np.ndarray,
    grids: np.ndarray,
    merge_size: int,
    times: Sequence[Sequence[int] | None] | None = None,
) -> np.ndarray:
    """Return (3, L) int64 positions (t, h, w) as transformers' `get_rope_index` does.

    `is_image (L,) bool` marks image tokens; `grids (num_images, 3)` are the patch grids of the
    images in order, `times` where on axis t their frames are, one after another where it is None.
    Text tokens have three equal positions; an image's begin at the next position on every axis, and
    text goes on after the image's longer side. With times it goes on after what t has reached, if
    that is more: so Qwen-Omni does, and Qwen2.5-VL was trained (transformers to 5.2; since 5.3 its
    `get_rope_index` goes on inside of the video, see its issue 45381, but still generates after
    it).
    """
    steps = np.ones(len(is_image), dtype=np.int64)  # how far each token moves the next one
    steps[is_image] = 0
    image_tokens = np.flatnonzero(is_image)
    sizes = grids // np.array([1, merge_size, merge_size])
    ends = np.cumsum(sizes.prod(axis=1)) if len(grids) else np.zeros(0, dtype=np.int64)
    assert len(image_tokens) == (ends[-1] if len(ends) else 0), "one token per merged patch"
    placed = []
    steps_of_t = times or [None] * len(grids)
    for (frames, height, width), end, each in zip(sizes, ends, steps_of_t, strict=True):
        within = np.indices((frames, height, width)).reshape(3, -1)
        if each is not None:
            within[0] = np.repeat(each, height * width)
        placed.append((image_tokens[end - frames * height * width : end], within))
        steps[image_tokens[end - 1]] = max(height, width)
        if each is not None:
            steps[image_tokens[end - 1]] = within.max() + 1
    positions = np.tile(np.cumsum(steps) - steps, (3, 1))
    for tokens, within in placed:
        positions[:, tokens] = positions[0, tokens[0]] + within
    return positions
