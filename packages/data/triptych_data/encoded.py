"""What becomes of a sample under a model folder: encoded, or only measured."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """One document, ready to pack.

    `input_ids (L,)`, `shift_labels (L,)`, `position_ids (3, L)`, of a processor without images
    (1, L), `image_grid_thw (num_images, 3)`, `image_positions (num_image_tokens,)` into L: int64;
    `pixel_values (num_patches, patch_dim)` uint8, None without images; `num_targets` counts the
    labels that are not -100. Each temporal patch of a video counts as an image here.
    """

    key: str
    input_ids: Tensor
    shift_labels: Tensor
    position_ids: Tensor
    pixel_values: Tensor | None
    image_grid_thw: Tensor
    image_positions: Tensor
    num_targets: int


class Measures(NamedTuple):
    """What a sample will take.

    Tokens, targets among them, patches, images or pairs of video frames that they belong to, and
    the sum of the squares of their patches: attention is over the pairs of patches of each.
    """

    num_tokens: int
    num_targets: int
    num_patches: int
    num_images: int
    patch_pairs: int
