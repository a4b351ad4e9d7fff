"""Samples as one picture."""

import numpy as np
import torch
from torch import Tensor

SMALLEST = 32  # pixels of a sample's side; smaller ones are enlarged


def grid(samples: Tensor, columns: int, reach: float) -> np.ndarray:
    """(N, C, ..., S, S) -> (H, W, 3) uint8, row by row; of videos the first frame.

    -reach is black, reach white. Of more than three channels the first three are shown.
    """
    frames = samples.float().cpu()
    while frames.ndim > 4:
        frames = frames[:, :, 0]
    channels = frames.shape[1]
    shown = frames[:, :3] if channels >= 3 else frames[:, :1].expand(-1, 3, -1, -1)
    scaled = ((shown / reach + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    scale = -(-SMALLEST // scaled.shape[-1])
    scaled = scaled.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    padded = torch.nn.functional.pad(scaled, (1, 1, 1, 1), value=255)
    count, _, height, width = padded.shape
    rows = -(-count // columns)
    missing = padded.new_full((rows * columns - count, 3, height, width), 255)
    cells = torch.cat([padded, missing]).view(rows, columns, 3, height, width)
    picture = cells.permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, 3)
    return picture.numpy()
