"""Whisper's encoder, as Qwen2-Audio and Aero have it, over packed recordings without silence.

Stock pads every recording with silence up to 30 seconds, which attention does not look at; here it
is not computed. The two convolutions do reach two frames into it, so those come with a recording.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn import functional as F
from transformers import Qwen2AudioEncoder

from .audio_tower import first_of_pairs, halve
from .vision import RunLayer, to_device

BEHIND = 2
"""Frames of silence that come with each recording."""


class Padded(NamedTuple):
    """Where the frames of a batch of recordings stand, each padded to C frames."""

    frames: Tensor
    """(audios, C) int64: a frame's number; behind the last where there is none"""
    kept: Tensor
    """(K,) int64: the places, of C // 2 a recording, that have a frame after the convolutions"""
    pooled: Tensor
    """(M,) int64: the first of each two of those that become a token"""
    cu_seqlens: Tensor
    """(audios + 1,) int32: where each recording's begin among those that are kept"""


def audio_features(
    tower: Qwen2AudioEncoder, frames: Tensor, lengths: Tensor, run_layer: RunLayer
) -> Tensor:
    """Features before the projector.

    frames (N, num_mels) float, log-mel, lengths (num_audios,) int64 on the host: of each recording
    so many and BEHIND more → (M, hidden), a token for every four frames. Source: arXiv 2407.10759,
    section 2, and the stock forward.
    """
    with unset_fake_temporarily():  # it depends on values, also where a plan runs on fake tensors
        layout, longest = lay_out(lengths), int(halve(lengths.max()))
    layout = Padded(*(to_device(x, frames.device) for x in layout))
    frames = frames.to(tower.conv1.weight.dtype)
    padded = F.pad(frames, (0, 0, 0, 1))[layout.frames]  # (audios, C, num_mels)
    hidden_states = F.gelu(tower.conv2(F.gelu(tower.conv1(padded.mT)))).mT  # (audios, C / 2, …)
    places = layout.kept % hidden_states.shape[1]
    hidden_states = hidden_states.flatten(0, 1)[layout.kept] + tower.embed_positions(places)
    hidden_states = hidden_states[None]  # (1, K, hidden)
    for layer in tower.layers:
        hidden_states = run_layer(
            layer,
            hidden_states,
            attention_mask=None,
            cu_seqlens=layout.cu_seqlens,
            max_seqlen=longest,
            causal=False,
        )
    pairs = hidden_states[0, layout.pooled] + hidden_states[0, layout.pooled + 1]
    features: Tensor = tower.layer_norm(pairs / 2)
    return features


def lay_out(lengths: Tensor) -> Padded:
    """Recordings of `lengths` (num_audios,) int64 frames and BEHIND more, on the host."""
    rows = lengths + BEHIND
    starts = rows.cumsum(0) - rows
    places = torch.arange(-(-int(rows.max()) // 2) * 2)
    frames = torch.where(places < rows[:, None], starts[:, None] + places, int(rows.sum()))
    halved = halve(lengths)
    kept = (torch.arange(len(places) // 2) < halved[:, None]).flatten().nonzero().flatten()
    cu_seqlens = F.pad(halved.cumsum(0), (1, 0)).to(torch.int32)
    return Padded(frames, kept, first_of_pairs(halved), cu_seqlens)
