"""Differentiable augmentation of what a discriminator sees (DiffAugment, arXiv 2006.10738).

All that is random comes as numbers in [0, 1), so that it is the same on any ranks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

SHIFT, HOLE = 1 / 8, 1 / 2  # of a side


def augment(images: Tensor, numbers: Tensor, ways: Sequence[str]) -> Tensor:
    """(N, 3, S, S) from 0 to 1 -> the same shape, by numbers (N, 7) in [0, 1)."""
    n = numbers.to(images.dtype).T.unflatten(1, (-1, 1, 1, 1))  # (7, N, 1, 1, 1)
    images = 2 * images - 1
    if "color" in ways:
        images = images + (n[0] - 0.5)  # brightness
        grey = images.mean(1, keepdim=True)
        images = grey + 2 * n[1] * (images - grey)  # saturation
        mean = images.mean((1, 2, 3), keepdim=True)
        images = mean + (n[2] + 0.5) * (images - mean)  # contrast
    if "translation" in ways:
        images = _moved(images, n[3], n[4])
    if "cutout" in ways:
        side = images.shape[-1]
        hole = int(side * HOLE + 0.5)
        images = images * _mask(n[5], n[6], side, hole)
    return (images + 1) / 2


def _moved(images: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Moved by up to an eighth; grey comes in."""
    side = images.shape[-1]
    most = int(side * SHIFT + 0.5)
    rows, columns = (
        torch.arange(side, device=images.device)
        - (number * (2 * most + 1)).long().view(-1, 1)
        + most
        for number in (down, right)
    )  # (N, S): where a row, or column, comes from
    inside = ((rows >= 0) & (rows < side))[:, None, :, None]
    inside = inside & ((columns >= 0) & (columns < side))[:, None, None, :]
    # Rows, then columns: backward, that adds where they came from, without sorting all places.
    rows = rows.clamp(0, side - 1)[:, None, :, None].expand_as(images)
    columns = columns.clamp(0, side - 1)[:, None, None, :].expand_as(images)
    return images.gather(2, rows).gather(3, columns) * inside


def _mask(down: Tensor, right: Tensor, side: int, hole: int) -> Tensor:
    """(N, 1, S, S): 0 in a square whose middle is anywhere, 1 outside."""
    span = torch.arange(side, device=down.device)

    def covers(number: Tensor) -> Tensor:
        first = (number.view(-1, 1) * (side + 1 - hole % 2)).long() - hole // 2
        return (span >= first) & (span < first + hole)

    covered = covers(down)[:, None, :, None] & covers(right)[:, None, None, :]
    return (~covered).to(down.dtype)
