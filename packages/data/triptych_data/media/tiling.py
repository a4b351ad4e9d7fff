"""Images of any resolution whole and in tiles, as LLaVA-OneVision cuts them (arXiv 2408.03326).

An image is seen once whole, squeezed into a tile, and once in as many tiles as fit it best, with
black beside it where its shape is none of theirs. What the vision tower makes of those borders is
cut away again (`TileLayout.kept`), and each row of what is left ends in a learned line break.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from triptych_data.media.images import decode_image, resize

_MOST_OVER = 1.1  # features are shrunk only if a side is over by more: LLaVA-OneVision's rule


class TilingRules(NamedTuple):
    """How a model tiles: pixels and features per side of a tile, the sizes (height, width) in
    pixels that tiles may make together, and how many tiles' features an image may keep."""

    tile: int
    side: int
    resolutions: tuple[tuple[int, int], ...]
    max_tiles: int = 9


class TileLayout(NamedTuple):
    """How an image is tiled, known from its size alone.

    `grid` rows and columns of tiles; `size` (height, width) in pixels of the image inside them;
    `kept` (top, left, height, width) in features what of them shows the image; `shrunk` (height,
    width) in features what is left after interpolation; `num_tokens` with the whole image and with
    a line break after each row.
    """

    grid: tuple[int, int]
    size: tuple[int, int]
    kept: tuple[int, int, int, int]
    shrunk: tuple[int, int]
    num_tokens: int


def encode_tiles(
    data: bytes, rules: TilingRules, vary: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, TileLayout]:
    """Decode an image file and tile it: (1 + rows * columns, 3, tile, tile) uint8, its layout.

    `vary` may change the decoded pixels (3, H, W), not their number. Raises ValueError for a file
    that cannot be decoded.
    """
    image = decode_image(data)
    if vary is not None:
        image = vary(image)
    layout = tile_layout(image.shape[2], image.shape[1], rules)
    return tile_image(image, layout, rules), layout


def tile_image(image: Tensor, layout: TileLayout, rules: TilingRules) -> Tensor:
    """Cut (3, H, W) uint8: first the whole image as one tile, then its tiles row by row."""
    (rows, cols), (height, width), tile = layout.grid, layout.size, rules.tile
    canvas = torch.zeros(3, rows * tile, cols * tile, dtype=image.dtype)
    top, left = (rows * tile - height) // 2, (cols * tile - width) // 2
    canvas[:, top : top + height, left : left + width] = resize(image, height, width)
    tiles = canvas.reshape(3, rows, tile, cols, tile).permute(1, 3, 0, 2, 4)
    return torch.cat([resize(image, tile, tile)[None], tiles.reshape(-1, 3, tile, tile)])


def square_tile(image: Tensor, tile: int, background: Sequence[int]) -> Tensor:
    """(3, H, W) uint8 as one tile (3, tile, tile), `background` beside it: one of many images."""
    _, height, width = image.shape
    longest = max(height, width)
    square = torch.tensor(background, dtype=image.dtype)[:, None, None].repeat(1, longest, longest)
    top, left = (longest - height) // 2, (longest - width) // 2
    square[:, top : top + height, left : left + width] = image
    return resize(square, tile, tile)


def tile_layout(width: int, height: int, rules: TilingRules) -> TileLayout:
    """How an image of `width` x `height` pixels is tiled."""
    target = best_resolution(width, height, rules.resolutions)
    rows, cols = target[0] // rules.tile, target[1] // rules.tile
    across, down = target[1] / width, target[0] / height
    if across < down:
        size = (min(math.ceil(height * across), target[0]), target[1])
    else:
        size = (target[0], min(math.ceil(width * down), target[1]))
    kept = _kept(width, height, rows * rules.side, cols * rules.side)
    shrunk = kept[2:]
    over = math.sqrt(kept[2] * kept[3] / (rules.max_tiles * rules.side**2))
    if over > _MOST_OVER:
        shrunk = (int(kept[2] // over), int(kept[3] // over))
    num_tokens = rules.side**2 + shrunk[0] * (shrunk[1] + 1)
    return TileLayout((rows, cols), size, kept, shrunk, num_tokens)


def best_resolution(
    width: int, height: int, resolutions: tuple[tuple[int, int], ...]
) -> tuple[int, int]:
    """The (height, width) that keeps most pixels of an image, and of those the smallest."""

    def merit(resolution: tuple[int, int]) -> tuple[int, int]:
        scale = min(resolution[1] / width, resolution[0] / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        return effective, effective - resolution[0] * resolution[1]

    return max(resolutions, key=merit)  # the first of equals, as in stock


def _kept(width: int, height: int, rows: int, cols: int) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the features that show an image centred in rows x cols."""
    # Rounded to seven places first: so a product like 26.999999996 is 27, as in stock.
    if width / height > cols / rows:
        border = (rows - int(round(height * (cols / width), 7))) // 2
        return border, 0, rows - 2 * border, cols
    border = (cols - int(round(width * (rows / height), 7))) // 2
    return 0, border, rows, cols - 2 * border
