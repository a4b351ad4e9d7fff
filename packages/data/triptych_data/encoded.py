"""What becomes of a sample under a model folder: encoded, or only measured."""

from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from triptych_data.media.taps import Taps

IGNORE_INDEX = -100


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """One document, ready to pack.

    `input_ids (L,)`, `shift_labels (L,)`, `position_ids (3, L)`, of a processor without M-RoPE
    (1, L), `image_grid_thw (num_images, 3)`, `image_positions (num_image_tokens,)` into L: int64;
    `pixel_values (num_patches, patch_dim)` uint8, None without images; `audio_features (num_frames,
    num_mels)` float32, None without sound, `audio_lengths (num_audios,)` frames of each recording,
    beside the processor's `frames_behind`, and `audio_positions (num_audio_tokens,)` into L: int64;
    `num_targets` counts the labels that are not -100. A video counts as an image here, of one frame
    a temporal patch; in Qwen3-VL's layout each temporal patch counts as one.
    """

    key: str
    input_ids: Tensor
    shift_labels: Tensor
    position_ids: Tensor
    pixel_values: Tensor | None
    image_grid_thw: Tensor
    image_positions: Tensor
    audio_features: Tensor | None
    audio_lengths: Tensor
    audio_positions: Tensor
    num_targets: int
    taps: Taps | None = None
    """of which features each image token is made, where that is not one after another"""

    @property
    def image_taps(self) -> Tensor | None:
        """(num_image_tokens, 4) int64, as in a batch."""
        return None if self.taps is None else self.taps.features

    @property
    def image_tap_weights(self) -> Tensor | None:
        """(num_image_tokens, 4) float32, as in a batch."""
        return None if self.taps is None else self.taps.weights


def cut_piece(sample: EncodedSample, number: int, seq_len: int) -> EncodedSample:
    """Return piece `number` of a document that is longer than a pack, as `pieces` counts them.

    Of any other sample it is the sample.
    """
    if len(sample.input_ids) <= seq_len:
        return sample
    span = slice(number * seq_len, (number + 1) * seq_len)
    labels = sample.shift_labels[span]
    return replace(
        sample,
        key=f"{sample.key}#{number}",
        input_ids=sample.input_ids[span],
        shift_labels=labels,
        position_ids=sample.position_ids[:, : len(labels)],
        num_targets=int((labels != IGNORE_INDEX).sum()),
    )


class Measures(NamedTuple):
    """What a sample will take.

    Tokens, targets among them, patches, images or pairs of video frames that they belong to, the
    sum of the squares of their patches: attention is over the pairs of patches of each; and frames
    of recordings.
    """

    num_tokens: int
    num_targets: int
    num_patches: int
    num_images: int
    patch_pairs: int
    audio_frames: int
