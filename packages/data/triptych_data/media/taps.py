"""How features of tiles become tokens: each the weighted sum of up to four, or a line break.

So an image in tiles is put together, its borders cut away, and shrunk where it has too many
features; so each frame of a video is pooled. Which features and by what weights is known from sizes
alone, so it is computed where samples are encoded, and a step only gathers.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from triptych_data.media.tiling import TileLayout

LINE_BREAK = -1
"""Stands for the line break among the numbers of features."""


class Taps(NamedTuple):
    """Of n tokens: numbers of features `(n, 4)` int64, counted over all tiles row by row, and their
    weights `(n, 4)` float32."""

    features: Tensor
    weights: Tensor


def tiled_taps(layout: TileLayout, side: int) -> Taps:
    """Taps of an image in tiles of `side` x `side` features: the whole image, then its tiles."""
    rows, cols = layout.grid
    by_tile = side**2 + np.arange(rows * cols * side**2).reshape(rows, cols, side, side)
    numbers = by_tile.transpose(0, 2, 1, 3).reshape(rows * side, cols * side)
    top, left, height, width = layout.kept
    features, weights = _resized(numbers[top : top + height, left : left + width], *layout.shrunk)
    broken = _taps(
        np.pad(features, ((0, 0), (0, 1), (0, 0)), constant_values=LINE_BREAK),
        np.pad(weights, ((0, 0), (0, 1), (0, 0)), constant_values=0),
    )
    broken.weights[broken.features[:, 0] == LINE_BREAK, 0] = 1
    return join_taps([_whole(side), broken], [0, 0])


def square_taps(side: int) -> Taps:
    """Taps of one of several images: a tile and a line break."""
    return join_taps([_whole(side), _line_break()], [0, 0])


def frame_taps(num_frames: int, side: int) -> Taps:
    """Taps of a video: each frame's features pooled to half a side, one line break at last."""
    frame = np.arange(side**2).reshape(side, side)
    pooled = _taps(*_resized(frame, pooled_side(side), pooled_side(side)))
    starts = [number * side**2 for number in range(num_frames)]
    return join_taps([*[pooled] * num_frames, _line_break()], [*starts, 0])


def pooled_side(side: int) -> int:
    """Features along a side of a pooled frame."""
    return -(-side // 2)


def join_taps(taps: list[Taps], starts: list[int]) -> Taps:
    """All taps one after another, those of `taps[i]` counting features from `starts[i]`."""
    moved = [
        torch.where(each.features == LINE_BREAK, LINE_BREAK, each.features + start)
        for each, start in zip(taps, starts, strict=True)
    ]
    return Taps(torch.cat(moved), torch.cat([each.weights for each in taps]))


def _whole(side: int) -> Taps:
    return _taps(*_resized(np.arange(side**2).reshape(side, side), side, side))


def _line_break() -> Taps:
    return Taps(torch.full((1, 4), LINE_BREAK), torch.tensor([[1.0, 0.0, 0.0, 0.0]]))


def _taps(features: np.ndarray, weights: np.ndarray) -> Taps:
    return Taps(
        torch.from_numpy(features.reshape(-1, 4)),
        torch.from_numpy(weights.reshape(-1, 4).astype(np.float32)),
    )


def _resized(numbers: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers and weights (height, width, 4) of a bilinear resizing of what is numbered (h, w)."""
    rows, row_weights = _linear(numbers.shape[0], height)
    cols, col_weights = _linear(numbers.shape[1], width)
    features = numbers[rows[:, None, :, None], cols[None, :, None, :]]  # (height, width, 2, 2)
    weights = row_weights[:, None, :, None] * col_weights[None, :, None, :]
    return features.reshape(height, width, 4), weights.reshape(height, width, 4)


def _linear(length: int, wanted: int) -> tuple[np.ndarray, np.ndarray]:
    """Two neighbours and their weights (wanted, 2): torch's bilinear rule, without antialias."""
    scale = np.float32(length) / np.float32(wanted)
    source = scale * (np.arange(wanted, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5)
    source = np.maximum(source, np.float32(0))
    first = np.minimum(source.astype(np.int64), length - 1)
    second = np.minimum(first + 1, length - 1)
    high = source - first.astype(np.float32)
    return np.stack([first, second], 1), np.stack([1 - high, high], 1)
