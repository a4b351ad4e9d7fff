"""Qwen2.5-VL's vision tower over packed images: attention within windows, in few blocks per frame.

What depends on the image grids (rotary angles, the order of windows) is computed on the host, where
the grids are, and copied over without waiting. Equal to the stock tower of transformers 5.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
)

from .vision import RunLayer, block_order, rotary_tables, to_device


class Windows(NamedTuple):
    """How patches are laid out so that those of a window are neighbours."""

    order: Tensor
    """(M,) int64: which merge block of the row stands at each place"""
    back: Tensor
    """(M,) int64: where each merge block stands"""
    cu_seqlens: Tensor
    """(windows + 1,) int32, in patches"""
    coordinates: Tensor
    """(P, 2) int64: row and column of each patch, as laid out, for the rotary angles"""


def window_features(
    visual: Qwen2_5_VisionTransformerPretrainedModel,
    pixels: Tensor,
    grid_thw: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    run_layer: RunLayer,
) -> Tensor:
    """Features that replace the image tokens.

    pixels (P, patch_dim) float, grid_thw (num_images, 3) on the host, cu_seqlens
    (num_frames + 1,) int32 → (M, H), M = P / merge_size². Source: arXiv 2502.13923, section 2.1.1.
    """
    unit, side = visual.spatial_merge_unit, window_side(visual.config)
    with unset_fake_temporarily():  # it depends on values, also where a plan runs on fake tensors
        windows = window_layout(grid_thw, visual.spatial_merge_size, side)
    windows = Windows(*(to_device(x, pixels.device) for x in windows))
    hidden_states = visual.patch_embed(pixels)  # (P, hidden)
    hidden_states = hidden_states.unflatten(0, (-1, unit))[windows.order].flatten(0, 1)
    rotary = rotary_tables(windows.coordinates, visual.rotary_pos_emb.inv_freq)
    for index, block in enumerate(visual.blocks):
        whole = index in visual.fullatt_block_indexes
        hidden_states = run_layer(
            block,
            hidden_states,
            cu_seqlens=cu_seqlens if whole else windows.cu_seqlens,
            max_seqlen=max_seqlen if whole else side**2 * unit,
            position_embeddings=rotary,
        )
    features: Tensor = visual.merger(hidden_states)[windows.back]
    return features


def window_side(vision: object) -> int:
    """Merge blocks along a side of a window."""
    pixels: int = vision.window_size  # type: ignore[attr-defined]
    return pixels // vision.spatial_merge_size // vision.patch_size  # type: ignore[attr-defined]


def window_layout(grid_thw: Tensor, merge_size: int, side: int) -> Windows:
    """Windows of images whose grids are grid_thw (num_images, 3), in patches, on the host."""
    known: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}
    orders, lengths, coordinates, start = [], [], [], 0
    for t, h, w in grid_thw.tolist():
        if (h, w) not in known:
            known[h, w] = frame_windows(h, w, merge_size, side)
        order, counts, places = known[h, w]
        for _ in range(t):
            orders.append(order + start)
            lengths.append(counts * merge_size**2)
            coordinates.append(places)
            start += len(order)
    order = torch.cat(orders)
    ends = torch.cat(lengths).cumsum(0)
    cu_seqlens = torch.nn.functional.pad(ends, (1, 0)).to(torch.int32)
    return Windows(order, order.argsort(), cu_seqlens, torch.cat(coordinates))


def frame_windows(
    height: int, width: int, merge_size: int, side: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of one frame: the order of its merge blocks, how many each window has, and coordinates."""
    rows, columns = height // merge_size, width // merge_size
    across = -(-columns // side)
    window = torch.arange(rows)[:, None] // side * across + torch.arange(columns) // side
    order = window.flatten().argsort(stable=True)
    patches = torch.stack(block_order(height, width, merge_size), 1)  # (P, 2)
    return order, window.flatten().bincount(), patches.view(len(order), -1, 2)[order].flatten(0, 1)
