"""Encoded samples to the batch of one packed row that a model takes."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from triptych_data.encoded import EncodedSample
from triptych_data.media.taps import join_taps
from triptych_data.text.chat import IGNORE_INDEX

Batch = dict[str, Any]
Finish = Callable[[Batch, int | None], Batch]
"""What a stage does to a batch where it is made, of an epoch; None for held-out samples."""

# Longest lengths are rounded up to multiples of this, so that compiled kernels see few of them.
_BUCKET = 256


def collate(
    samples: Sequence[EncodedSample], seq_len: int, *, pad_token_id: int, position_axes: int = 3
) -> Batch:
    """Lay samples end to end in one row of `seq_len` tokens (T); none gives a row of padding.

    - `input_ids`, `shift_labels` (1, T) int64, `position_ids` (3, 1, T) int64 (float32 of
      a processor whose positions are fractional), with one position axis (1, T), restarting with
      each document; the padding tail is the last document, ignored, with positions from 0
    - `cu_seqlens (num_docs + 1,)` int32; `max_seqlen` bounds a document, a multiple of 256 or T
    - `num_targets`: labels that are not -100; `num_tokens`: without padding; `sample_keys`
    - with images: `pixel_values (num_patches, patch_dim)` uint8, `image_grid_thw (num_images, 3)`
      int64, `image_positions (num_image_tokens,)` int64 into T, `vision_cu_seqlens
      (num_frames + 1,)` int32, and `vision_max_seqlen` that bounds a frame's patches; a video
      is an image of as many frames as temporal patches, or each of those is an image
    - of a model that arranges features (LLaVA-OneVision): `image_taps (num_image_tokens, 4)` int64,
      numbers of the tiles' features, -1 a line break, and `image_tap_weights` float32
    - with sound: `audio_features (num_frames, num_mels)` float32, log-mel, `audio_lengths
      (num_audios,)` int64, frames of each recording, `audio_positions (num_audio_tokens,)` int64
      into T
    """
    lengths = [len(sample.input_ids) for sample in samples]
    padding = seq_len - sum(lengths)
    assert padding >= 0, "packs are planned not to overflow"
    if padding:
        lengths.append(padding)
    positions = [
        *(s.position_ids for s in samples),
        torch.arange(padding).expand(position_axes, -1),
    ]
    position_ids = torch.cat(positions, dim=1)  # (axes, T)
    input_ids = _row([s.input_ids for s in samples], padding, pad_token_id)
    batch: Batch = {
        "input_ids": input_ids,
        "shift_labels": _row([s.shift_labels for s in samples], padding, IGNORE_INDEX),
        "position_ids": position_ids if position_axes == 1 else position_ids.unsqueeze(1),
        "cu_seqlens": _offsets(torch.tensor(lengths)),
        "max_seqlen": min(_bucket(max(lengths)), seq_len),
        "num_targets": sum(sample.num_targets for sample in samples),
        "num_tokens": seq_len - padding,
        "sample_keys": [sample.key for sample in samples],
    }
    pixels = [sample.pixel_values for sample in samples if sample.pixel_values is not None]
    if pixels:
        grids = torch.cat([sample.image_grid_thw for sample in samples])
        frames = torch.repeat_interleave(grids[:, 1] * grids[:, 2], grids[:, 0])
        batch["pixel_values"] = torch.cat(pixels)
        batch["image_grid_thw"] = grids
        batch["vision_cu_seqlens"] = _offsets(frames)
        batch["vision_max_seqlen"] = _bucket(int(frames.max()))
        batch["image_positions"] = _shifted([s.image_positions for s in samples], lengths)
        batch |= _image_taps(samples)
    frames_heard = [s.audio_features for s in samples if s.audio_features is not None]
    if frames_heard:
        batch["audio_features"] = torch.cat(frames_heard)
        batch["audio_lengths"] = torch.cat([sample.audio_lengths for sample in samples])
        batch["audio_positions"] = _shifted([s.audio_positions for s in samples], lengths)
    return batch


def _shifted(positions: list[Tensor], lengths: list[int]) -> Tensor:
    """Positions within documents of these lengths to those in the row, (sum,) int64."""
    starts = accumulate(lengths, initial=0)
    return torch.cat([each + start for each, start in zip(positions, starts, strict=False)])


def _image_taps(samples: Sequence[EncodedSample]) -> Batch:
    """Taps of all image tokens, counting the row's features; nothing of a model without them."""
    taps = [sample.taps for sample in samples if sample.taps is not None]
    if not taps:
        return {}
    pixels = [sample.pixel_values for sample in samples if sample.pixel_values is not None]
    starts = [0, *accumulate(len(patches) for patches in pixels)]
    joined = join_taps(taps, starts[:-1])
    return {"image_taps": joined.features, "image_tap_weights": joined.weights}


def _row(documents: list[Tensor], padding: int, value: int) -> Tensor:
    return torch.cat([*documents, torch.full((padding,), value)]).unsqueeze(0)


def _offsets(lengths: Tensor) -> Tensor:
    """Return (len(lengths) + 1,) int32: where each begins, and where the last ends."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def _bucket(length: int) -> int:
    return -(-length // _BUCKET) * _BUCKET
