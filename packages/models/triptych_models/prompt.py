"""What is answered, and where an answer ends."""

from typing import Protocol

from torch import Tensor


class Prompt(Protocol):
    """One encoded prompt; fields of images and sound None or empty without them."""

    input_ids: Tensor
    """(n,) int64."""
    pixel_values: Tensor | None
    """(patches, patch_dim) uint8."""
    image_grid_thw: Tensor | None
    """(num_images, 3) int64."""
    audio_features: Tensor | None
    """(frames, num_mels) float."""
    audio_lengths: Tensor | None
    """(num_audios,) int64."""
    position_ids: Tensor
    """(3, n) of M-RoPE, else (1, n) int64."""


def before_stop(tokens: list[int], stops: set[int]) -> list[int]:
    """The tokens before the first stop."""
    end = next((i for i, token in enumerate(tokens) if token in stops), len(tokens))
    return tokens[:end]
