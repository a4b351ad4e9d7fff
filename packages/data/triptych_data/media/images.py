"""Image files to uint8 patches: decode, resize by Qwen's rule, cut into patches."""

import math
import struct
import warnings
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from io import BytesIO
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import io
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from triptych_data.media.probe import BROKEN, FORMATS, MAX_PIXELS, ORIENTATION, check_effort

if TYPE_CHECKING:
    from triptych_data.media.tiling import TilingRules
    from triptych_data.media.video import VideoRules

BICUBIC = 3
INTERPOLATIONS = {2: InterpolationMode.BILINEAR, BICUBIC: InterpolationMode.BICUBIC}
"""By Pillow's numbers, as preprocessor files write them."""

_MAX_ASPECT_RATIO = 200  # transformers' Qwen2-VL refuses slimmer images

# (file format, Pillow mode) of what torchvision decodes to the same pixels at twice the speed. Not
# PNG: it is only 1.2 times as fast there, and a damaged file ends the process (torchvision 0.29).
_FAST_DECODERS: dict[tuple[str, str], Callable[..., Tensor]] = {
    ("JPEG", "RGB"): io.decode_jpeg,
    ("JPEG", "L"): io.decode_jpeg,
    ("MPO", "RGB"): io.decode_jpeg,
    ("WEBP", "RGB"): io.decode_webp,
}

_WORDS = ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.uint8))

# What EXIF orientation k asks for: (transpose, flip vertically, flip horizontally), in this order.
_ORIENTATIONS = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


class ImageRules(NamedTuple):
    """How a model cuts images: pixels per patch side, patches per token side, frames per patch,
    and the bounds on an image's pixels after resizing; or the one size that all images get."""

    patch_size: int
    merge_size: int
    temporal_patch_size: int
    min_pixels: int
    max_pixels: int
    side: int | None = None
    """Of the square that every image is stretched to, and cut to whole patches."""
    interpolation: int | None = None
    """Pillow's number for it; None is bicubic."""
    tokens: int | None = None
    """An image of one size becomes so many; None is one for merge_size x merge_size patches."""
    tiles: tuple[int, int] | None = None
    """Fewest and most squares of one size that an image is cut into; None is one, never cut."""
    tiling: "TilingRules | None" = None
    """How an image alone in its sample is tiled; several are one square each."""
    most_side: int | None = None
    """Pixels of a side that a model has positions for, a multiple of a token's; None is any."""


def encode_image(
    data: bytes, rules: ImageRules, vary: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, tuple[int, int, int]]:
    """Decode an image file and cut it: patches (num_patches, patch_dim) uint8 and their grid.

    `vary` may change the decoded pixels (3, H, W), not their number. Raises ValueError for a file
    that cannot be decoded or an image too slim for the model.
    """
    image = decode_image(data)
    if vary is not None:
        image = vary(image)
    grid = image_grid(image.shape[2], image.shape[1], rules)
    height, width = grid[1] * rules.patch_size, grid[2] * rules.patch_size
    if rules.side is not None and rules.tiles is not None:
        return patchify(cut_tiles(image, rules)[:, :, :height, :width].contiguous(), rules), grid
    if rules.side is not None:
        image = resize(image, rules.side, rules.side, rules.interpolation)[:, :height, :width]
    else:
        image = resize(image, height, width)
    image = image.contiguous()
    return patchify(image.expand(rules.temporal_patch_size, -1, -1, -1), rules), grid


def image_grid(width: int, height: int, rules: ImageRules) -> tuple[int, int, int]:
    """Return the patch grid (t, h, w) of an image of `width` x `height` pixels.

    Both sides become multiples of `patch_size * merge_size`, the area stays within `min_pixels`
    and `max_pixels`: `smart_resize` of transformers' Qwen2-VL. What is longer than `most_side` then
    shrinks to it. By rules with a `side` all images
    have one grid; t counts the tiles where an image is cut into them.

    Raises ValueError if one side is over 200 times the other.
    """
    check_ratio(width, height)
    if rules.side is not None:
        rows, cols = tile_grid(width, height, rules)
        count = rows * cols + (rows * cols > 1)  # and the whole image
        return count, rules.side // rules.patch_size, rules.side // rules.patch_size
    factor = rules.patch_size * rules.merge_size
    new_height = round(height / factor) * factor
    new_width = round(width / factor) * factor
    if new_height * new_width > rules.max_pixels:
        shrink = math.sqrt(height * width / rules.max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < rules.min_pixels:
        enlarge = math.sqrt(rules.min_pixels / (height * width))
        new_height = math.ceil(height * enlarge / factor) * factor
        new_width = math.ceil(width * enlarge / factor) * factor
    most = rules.most_side
    if most is not None and max(new_height, new_width) > most:
        shrink = max(height, width) / most
        new_height, new_width = (
            most
            if side == max(height, width)
            else max(factor, int(side / shrink) // factor * factor)
            for side in (height, width)
        )
    return 1, new_height // rules.patch_size, new_width // rules.patch_size


def tile_grid(width: int, height: int, rules: ImageRules) -> tuple[int, int]:
    """Rows and columns of tiles of an image: the shape most like its own, as InternVL takes them.

    Of shapes alike the larger, as long as the image has over half of its pixels.
    """
    if rules.tiles is None or rules.side is None:
        return 1, 1
    best, error = (1, 1), math.inf
    for rows, cols in _tile_shapes(*rules.tiles):
        off = abs(width / height - cols / rows)
        if off < error or (off == error and width * height > rules.side**2 * rows * cols / 2):
            best, error = (rows, cols), off
    return best


def cut_tiles(image: Tensor, rules: ImageRules) -> Tensor:
    """(3, H, W) uint8 -> (N, 3, side, side): its tiles row by row, then the whole image."""
    assert rules.side is not None
    side, mode = rules.side, rules.interpolation
    rows, cols = tile_grid(image.shape[2], image.shape[1], rules)
    tiles = resize(image, rows * side, cols * side, mode)
    tiles = tiles.reshape(3, rows, side, cols, side).permute(1, 3, 0, 2, 4).flatten(0, 1)
    if len(tiles) == 1:
        return tiles
    return torch.cat([tiles, resize(image, side, side, mode)[None]])


@lru_cache(maxsize=8)
def _tile_shapes(fewest: int, most: int) -> list[tuple[int, int]]:
    """(rows, columns) of so many tiles, the fewest first, and of those the narrowest."""
    counts = range(1, most + 1)
    shapes = [(rows, cols) for cols in counts for rows in counts if fewest <= rows * cols <= most]
    return sorted(shapes, key=lambda shape: shape[0] * shape[1])


def check_ratio(width: int, height: int) -> None:
    """Raise ValueError if one side is over 200 times the other."""
    if max(height, width) > _MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(
            f"an image's longer side must be at most {_MAX_ASPECT_RATIO} times the shorter, "
            f"got {width}x{height}; crop it"
        )


def decode_image(data: bytes) -> Tensor:
    """Decode JPEG, PNG, WebP or what else Pillow reads to (3, height, width) uint8 RGB.

    The EXIF orientation is applied; transparency is laid on white; of an animation, the first
    picture is taken. Raises ValueError for a file that is damaged, no image, or by its header of
    over `probe.MAX_PIXELS`, which is not decoded.
    """
    try:
        # Pillow warns at half the size it refuses; there is nothing to do about it here.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return _decode(data)
    except (
        *BROKEN,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
    ) as error:
        raise ValueError(
            f"an image must be a whole JPEG, PNG or WebP file, got {len(data)} bytes that cannot "
            f"be decoded ({error}); replace the file"
        ) from error


def resize(image: Tensor, height: int, width: int, interpolation: int | None = None) -> Tensor:
    """Resize (3, H, W) uint8 to `height` x `width`, with antialias, rounded to uint8.

    `interpolation` is Pillow's number for it; None is bicubic.
    """
    if image.shape[1:] == (height, width):
        return image
    mode = INTERPOLATIONS[interpolation or BICUBIC]
    return transforms.resize(image, [height, width], interpolation=mode, antialias=True)


def patchify(frames: Tensor, rules: "ImageRules | VideoRules") -> Tensor:
    """Cut (T, 3, H, W) into (num_patches, 3 * temporal_patch_size * patch_size**2), same dtype.

    T is a multiple of `temporal_patch_size`. Patches that become one token are neighbours
    (merge_size x merge_size blocks, row by row): the order of transformers' Qwen2-VL.
    """
    patch, merge, depth = rules.patch_size, rules.merge_size, rules.temporal_patch_size
    num_frames, channels, height, width = frames.shape
    rows, cols = height // (patch * merge), width // (patch * merge)
    # Copied in words of up to 8 bytes, which never straddle patches: up to 4 times as fast.
    word = next(dtype for size, dtype in _WORDS if patch * frames.element_size() % size == 0)
    words = frames.view(word)  # (T, 3, H, words of a row of pixels)
    cut = words.reshape(num_frames // depth, depth, channels, rows, merge, patch, cols, merge, -1)
    cut = cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)  # …, channels, depth, patch, words of a row
    return cut.reshape(num_frames // depth * rows * cols * merge**2, -1).view(frames.dtype)


def _decode(data: bytes) -> Tensor:
    with Image.open(BytesIO(data), formats=FORMATS) as image:  # reads the header only
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError(
                f"{image.width} x {image.height} pixels, over {MAX_PIXELS}"
            )
        check_effort(data, *image.size)
        orientation = image.getexif().get(ORIENTATION, 1)
        fast = _FAST_DECODERS.get((image.format or "", image.mode))
        pixels = None
        if fast is not None and "transparency" not in image.info:
            # torch.frombuffer wants writable bytes; a copy of the compressed file is cheap.
            encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            with suppress(RuntimeError):  # Pillow, which checked the shards, decides what is broken
                pixels = fast(encoded, mode=io.ImageReadMode.RGB)
        if pixels is None:
            pixels = transforms.pil_to_tensor(_flatten(image))
    return _orient(pixels, orientation)


def _flatten(image: Image.Image) -> Image.Image:
    """Return the image as 8-bit RGB, on white where it is transparent."""
    if image.mode.startswith("I"):  # 16-bit gray, which Pillow's own conversion would clip to white
        image = Image.fromarray((np.asarray(image).astype(np.int32) >> 8).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def _orient(pixels: Tensor, orientation: int) -> Tensor:
    transpose, vertically, horizontally = _ORIENTATIONS.get(orientation, (False, False, False))
    if transpose:
        pixels = pixels.transpose(1, 2)
    dims = [dim for dim, flip in ((1, vertically), (2, horizontally)) if flip]
    return pixels.flip(dims).contiguous() if dims or transpose else pixels
