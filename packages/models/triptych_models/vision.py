"""Qwen3-VL's vision tower over packed images, driven block by block without a device sync.

Everything that depends on the image grids (interpolation of the learned positions, rotary angles)
is computed on the host, where the grids are, and copied over without waiting. Equal to the stock
tower of transformers 5, whose own helpers differ from release to release.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

RunLayer = Callable[..., Tensor]


class PositionTables(NamedTuple):
    """Where the P patches of a batch stand, in merge-block order."""

    indices: Tensor
    """(P, 4) int64: the four neighbours in the flattened learned position grid."""
    weights: Tensor
    """(P, 4) fp32: their bilinear weights."""
    coordinates: Tensor
    """(P, 2) int64: row and column, for the rotary angles."""


def normalize_pixels(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Map uint8 patches (P, C * rest) to (x / 255 - mean) / std per channel, fp32."""
    channels = pixels.unflatten(-1, (len(mean), -1)).float().unbind(1)
    scaled = [
        (x - 255 * m) / (255 * s) for x, m, s in zip(channels, mean, std, strict=True)
    ]  # scalars, not a tensor of them: that would be one more copy to the device
    return torch.stack(scaled, 1).flatten(1)


def embed_by_product(conv: nn.Conv2d | nn.Conv3d) -> None:
    """Let a convolution over patches that are cut already, one output each, be a matrix product.

    torch's kernel took 11 ms for 65,536 patches of Qwen3-VL on an H200, at 21 TFLOP/s.
    """
    convolve = conv.forward

    def forward(x: Tensor) -> Tensor:
        """(P, C, *kernel_size) → (P, D, 1, …)."""
        if x.shape[2:] != conv.kernel_size:
            return convolve(x)
        out = F.linear(x.flatten(1), conv.weight.flatten(1), conv.bias)
        return out.view(*out.shape, *(1 for _ in conv.kernel_size))

    conv.forward = forward  # type: ignore[assignment]


def vision_features(
    visual: Qwen3VLVisionModel,
    pixels: Tensor,
    grid_thw: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    run_layer: RunLayer,
) -> tuple[Tensor, list[Tensor]]:
    """Features that replace the image tokens, and those DeepStack adds to early language layers.

    pixels (P, patch_dim) float, grid_thw (num_images, 3) on the host, cu_seqlens
    (num_frames + 1,) int32 → (M, H) and one (M, H) per tapped block, M = P / merge_size².
    Source: the stock Qwen3VLVisionModel.forward and DeepStack, arXiv 2406.04334.
    """
    tables = position_tables(grid_thw, visual.num_grid_per_side, visual.spatial_merge_size)
    tables = PositionTables(*(to_device(x, pixels.device) for x in tables))
    hidden_states = visual.patch_embed(pixels)  # (P, hidden)
    positions = visual.pos_embed(tables.indices) * tables.weights[:, :, None]  # (P, 4, hidden)
    hidden_states = hidden_states + positions.sum(1).to(hidden_states.dtype)
    rotary = rotary_tables(tables.coordinates, visual.rotary_pos_emb.inv_freq)

    taps = list(getattr(visual, "deepstack_visual_indexes", ()))  # Qwen3.5 has none
    deepstack = []
    for index, block in enumerate(visual.blocks):
        hidden_states = run_layer(
            block,
            hidden_states,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            position_embeddings=rotary,
        )
        if index in taps:
            deepstack.append(visual.deepstack_merger_list[taps.index(index)](hidden_states))
    return visual.merger(hidden_states), deepstack


def position_tables(grid_thw: Tensor, side: int, merge_size: int) -> PositionTables:
    """Position tables of images whose grids are grid_thw (num_images, 3), in patches."""
    known: dict[tuple[int, int], PositionTables] = {}  # images of a batch are often of one size
    frames = []
    for t, h, w in grid_thw.tolist():
        if (h, w) not in known:
            known[h, w] = frame_tables(h, w, side, merge_size)
        frames += [known[h, w]] * t
    return PositionTables(*(torch.cat(parts) for parts in zip(*frames, strict=True)))


def frame_tables(height: int, width: int, side: int, merge_size: int) -> PositionTables:
    """Position tables of one frame."""
    rows, columns = block_order(height, width, merge_size)
    row_taps, row_weights = linear_taps(rows, height, side)
    column_taps, column_weights = linear_taps(columns, width, side)
    indices = (row_taps[:, :, None] * side + column_taps[:, None, :]).flatten(1)
    weights = (row_weights[:, :, None] * column_weights[:, None, :]).flatten(1)
    return PositionTables(indices, weights, torch.stack((rows, columns), 1))


def block_order(height: int, width: int, merge_size: int) -> tuple[Tensor, Tensor]:
    """Row and column of each patch, (height * width,) int64, one merge block after another."""
    m = merge_size
    shape = (height // m, width // m, m, m)
    rows = torch.arange(height).view(-1, 1, m, 1).expand(shape)
    columns = torch.arange(width).view(1, -1, 1, m).expand(shape)
    return rows.flatten(), columns.flatten()


def linear_taps(index: Tensor, size: int, side: int) -> tuple[Tensor, Tensor]:
    """Two neighbours and weights (P, 2) of points spread evenly, ends included, over a side."""
    source = index.float() * (side - 1) / max(size - 1, 1)
    floor = source.floor()
    taps = floor.long()[:, None] + torch.tensor([0, 1])
    high = source - floor
    return taps.clamp(max=side - 1), torch.stack((1 - high, high), 1)


def rotary_tables(coordinates: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin (P, head_dim) fp32 of 2-D rotary positions: angles of rows, then of columns."""
    angles = (coordinates[:, :, None] * inv_freq.float()).flatten(1)  # (P, head_dim / 2)
    angles = torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor without waiting; from pageable memory CUDA would wait for its stream."""
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)
