"""Qwen2.5-Omni's audio tower over packed recordings, driven layer by layer without a device sync.

A recording is cut into chunks, which convolutions and attention do not look across. What depends on
lengths is computed on the host, where they are, and copied over without waiting. Equal to the stock
tower of transformers 5.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn import functional as F
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniAudioEncoder

from .vision import RunLayer, to_device


class Chunks(NamedTuple):
    """Where the N frames of a batch of recordings stand in chunks of C, the last ones padded."""

    frames: Tensor
    """(chunks, C) int64: a frame's number; N where there is none"""
    is_frame: Tensor
    """(chunks, C) bool"""
    kept: Tensor
    """(K,) int64: the places, of C // 2 a chunk, that have a frame after the convolutions"""
    pooled: Tensor
    """(M,) int64: the first of each two of those that become a token"""
    cu_seqlens: Tensor
    """(chunks + 1,) int32: where each chunk's begin among those that are kept"""


def audio_features(
    tower: Qwen2_5OmniAudioEncoder, frames: Tensor, lengths: Tensor, run_layer: RunLayer
) -> Tensor:
    """Features that replace the audio tokens.

    frames (N, num_mels) float, log-mel, of one recording after the other; lengths (num_audios,)
    int64 on the host, their frames → (M, H), a token for every four frames. Source: arXiv
    2503.20215, section 2.2, and the stock forward.
    """
    size = 2 * tower.n_window
    with unset_fake_temporarily():  # it depends on values, also where a plan runs on fake tensors
        chunks = lay_out(lengths, size)
    chunks = Chunks(*(to_device(x, frames.device) for x in chunks))
    frames = frames.to(tower.conv1.weight.dtype)
    chunked = F.pad(frames, (0, 0, 0, 1))[chunks.frames]  # (chunks, C, num_mels)
    hidden_states = F.gelu(tower.conv1(chunked.mT)) * chunks.is_frame[:, None]
    hidden_states = F.gelu(tower.conv2(hidden_states)).mT  # (chunks, C / 2, hidden)
    positions = tower.positional_embedding.positional_embedding[: size // 2]
    hidden_states = hidden_states + positions.to(hidden_states.dtype)
    hidden_states = hidden_states.flatten(0, 1)[chunks.kept]  # (K, hidden)
    for layer in tower.layers:
        given = run_layer(layer, hidden_states, cu_seqlens=chunks.cu_seqlens, max_seqlen=size // 2)
        hidden_states = given[0]
    pairs = hidden_states[chunks.pooled] + hidden_states[chunks.pooled + 1]
    features: Tensor = tower.proj(tower.ln_post(pairs / 2))
    return features


def lay_out(lengths: Tensor, size: int) -> Chunks:
    """Chunks of recordings of `lengths` (num_audios,) int64 frames, on the host."""
    chunk_lengths = cut(lengths, size)
    starts = chunk_lengths.cumsum(0) - chunk_lengths
    places = torch.arange(size)
    is_frame = places < chunk_lengths[:, None]
    frames = torch.where(is_frame, starts[:, None] + places, int(lengths.sum()))
    halved = halve(chunk_lengths)
    kept = (torch.arange(size // 2) < halved[:, None]).flatten().nonzero().flatten()
    # Chunks are even: no frame more or less than of a recording uncut.
    pooled = first_of_pairs(halve(lengths))
    cu_seqlens = F.pad(halved.cumsum(0), (1, 0)).to(torch.int32)
    return Chunks(frames, is_frame, kept, pooled, cu_seqlens)


def first_of_pairs(lengths: Tensor) -> Tensor:
    """Where each two frames of recordings, one after the other, begin; an odd last is left out."""
    pairs = lengths // 2
    starts = torch.repeat_interleave(lengths.cumsum(0) - lengths, pairs)
    before = torch.repeat_interleave(pairs.cumsum(0) - pairs, pairs)
    return starts + 2 * (torch.arange(int(pairs.sum())) - before)


def cut(lengths: Tensor, size: int) -> Tensor:
    """Lengths (chunks,) of the pieces of recordings cut every `size` frames."""
    counts = -(-lengths // size)
    pieces = torch.full((int(counts.sum()),), size)
    pieces[counts.cumsum(0) - 1] = lengths - (counts - 1) * size
    return pieces


def halve(lengths: Tensor) -> Tensor:
    """Frames that a convolution of stride 2, padded by one, makes of so many."""
    return (lengths - 1) // 2 + 1
