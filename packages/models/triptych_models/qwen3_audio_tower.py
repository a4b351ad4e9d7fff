"""Qwen3-Omni's audio tower over packed recordings, driven layer by layer without a device sync.

A recording is cut into chunks for three convolutions over time and mel bands; attention looks
across eight of them. What depends on lengths is computed on the host and copied over without
waiting. Equal to what the stock tower of transformers 5 makes of each recording by itself: of
several, stock pads a short one to the longest before convolutions whose biases then reach its last
frame.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn import functional as F
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeAudioEncoder

from .audio_tower import cut, halve
from .vision import RunLayer, to_device

TOKENS = 13
"""Of a chunk; stock counts with no other number."""


class Windows(NamedTuple):
    """Where the N frames of a batch of recordings stand in chunks of C, the last ones padded."""

    frames: Tensor
    """(chunks, C) int64: a frame's number; N where there is none"""
    limits: Tensor
    """(3, chunks) int64: how much of a chunk there is after each convolution, as far as the next
    looks; all of a chunk that pads a recording of several"""
    kept: Tensor
    """(M,) int64: the places, of TOKENS a chunk, that become tokens"""
    cu_seqlens: Tensor
    """(windows + 1,) int32, in tokens"""


def audio_features(
    tower: Qwen3OmniMoeAudioEncoder, frames: Tensor, lengths: Tensor, run_layer: RunLayer
) -> Tensor:
    """Features that replace the audio tokens.

    frames (N, num_mels) float, log-mel, of one recording after the other; lengths (num_audios,)
    int64 on the host, their frames → (M, H), 13 tokens for every hundred frames. Source: arXiv
    2509.17765, section 2.2, and the stock forward.
    """
    size = 2 * tower.n_window
    window = window_tokens(tower.config)
    with unset_fake_temporarily():  # it depends on values, also where a plan runs on fake tensors
        layout = lay_out(lengths, size, window)
    layout = Windows(*(to_device(x, frames.device) for x in layout))
    frames = frames.to(tower.conv2d1.weight.dtype)
    hidden_states = F.pad(frames, (0, 0, 0, 1))[layout.frames].mT[:, None]  # (chunks, 1, mels, C)
    for convolution, limits in zip(
        (tower.conv2d1, tower.conv2d2, tower.conv2d3), layout.limits, strict=True
    ):
        hidden_states = F.gelu(convolution(hidden_states))  # (chunks, channels, mels / 2, C / 2)
        places = torch.arange(hidden_states.shape[3], device=limits.device)
        hidden_states = hidden_states * (places < limits[:, None])[:, None, None]
    flat = hidden_states.permute(0, 3, 1, 2).flatten(2)  # (chunks, TOKENS, channels * mels / 8)
    hidden_states = tower.conv_out(flat)
    positions = tower.positional_embedding.positional_embedding[:TOKENS]
    hidden_states = hidden_states + positions.to(hidden_states.dtype)
    hidden_states = hidden_states.flatten(0, 1)[layout.kept]  # (M, hidden)
    for layer in tower.layers:
        given = run_layer(layer, hidden_states, cu_seqlens=layout.cu_seqlens, max_seqlen=window)
        hidden_states = given[0]
    features: Tensor = tower.proj2(tower.act(tower.proj1(tower.ln_post(hidden_states))))
    return features


def window_tokens(audio: object) -> int:
    """Tokens that look at each other."""
    frames: int = audio.n_window_infer  # type: ignore[attr-defined]
    size: int = 2 * audio.n_window  # type: ignore[attr-defined]
    return frames // size * TOKENS


def lay_out(lengths: Tensor, size: int, window: int) -> Windows:
    """Chunks of `size` frames and windows of `window` tokens of recordings, on the host."""
    chunk_lengths = cut(lengths, size)
    starts = chunk_lengths.cumsum(0) - chunk_lengths
    places = torch.arange(size)
    frames = torch.where(
        places < chunk_lengths[:, None], starts[:, None] + places, int(lengths.sum())
    )
    counts = -(-lengths // size)
    is_alone = torch.repeat_interleave(counts == 1, counts)
    limits = [torch.where(is_alone, chunk_lengths, size)]
    for _ in range(3):
        limits.append(halve(limits[-1]))
    tokens = halve(halve(halve(chunk_lengths)))
    kept = (torch.arange(TOKENS) < tokens[:, None]).flatten().nonzero().flatten()
    each = torch.zeros_like(counts).index_add(
        0, torch.repeat_interleave(torch.arange(len(counts)), counts), tokens
    )
    cu_seqlens = F.pad(cut(each, window).cumsum(0), (1, 0)).to(torch.int32)
    return Windows(frames, torch.stack(limits[1:]), kept, cu_seqlens)
