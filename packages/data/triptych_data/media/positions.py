"""M-RoPE positions of one document: text counts on, an image spans its grid."""

from collections.abc import Sequence

import numpy as np

from triptych_data.media.soundtrack import SoundOrder, place_sound


def mrope_positions(
    is_image: np.ndarray,
    grids: np.ndarray,
    merge_size: int,
    times: Sequence[Sequence[float] | None] | None = None,
    sounds: Sequence[SoundOrder | None] | None = None,
    *,
    fractional: bool = False,
) -> np.ndarray:
    """Return (3, L) positions (t, h, w), int64 or, if fractional, float32, as transformers'
    `get_rope_index` does.

    `is_image (L,) bool` marks image tokens; `grids (num_images, 3)` are the patch grids of the
    images in order, `times` where on axis t their frames are, one after another where it is None.
    Text tokens have three equal positions; an image's begin at the next position on every axis, and
    text goes on after the image's longer side. With times it goes on after what t has reached, if
    that is more: so Qwen-Omni does, and Qwen2.5-VL was trained (transformers to 5.2; since 5.3 its
    `get_rope_index` goes on inside of the video, see its issue 45381, but still generates after
    it). `sounds` says of a video whose sound is heard how the tokens of both stand.
    """
    steps = np.ones(len(is_image))  # how far each token moves the next one
    steps[is_image] = 0
    image_tokens = np.flatnonzero(is_image)
    sizes = grids // np.array([1, merge_size, merge_size])
    ends = np.cumsum(sizes.prod(axis=1)) if len(grids) else np.zeros(0, dtype=np.int64)
    assert len(image_tokens) == (ends[-1] if len(ends) else 0), "one token per merged patch"
    placed = []
    nothing = [None] * len(grids)
    facts = zip(sizes, ends, times or nothing, sounds or nothing, strict=True)
    for (frames, height, width), end, each, sound in facts:
        within = np.indices((frames, height, width)).reshape(3, -1).astype(np.float64)
        if each is not None:
            within[0] = np.repeat(each, height * width)
        tokens = image_tokens[end - frames * height * width : end]
        if sound is not None:
            within, step = place_sound(sound, within)
            tokens = tokens[0] + np.arange(within.shape[1])
            steps[tokens] = 0
            steps[tokens[-1]] = step
            if sound.shares_borders:
                steps[[tokens[0] - 2, tokens[-1] + 1]] = 0
            placed.append((tokens, within))
            continue
        placed.append((tokens, within))
        steps[image_tokens[end - 1]] = max(height, width)
        if each is not None:
            steps[image_tokens[end - 1]] = within.max() + 1
    positions = np.tile(np.cumsum(steps) - steps, (3, 1))
    for tokens, within in placed:
        positions[:, tokens] = positions[0, tokens[0]] + within
    return positions.astype(np.float32 if fractional else np.int64)
