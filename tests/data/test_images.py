import io
import resource

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from tests.data.chats import encoded_image
from tests.tiny import ROOT
from triptych_data.media.images import ImageRules, decode_image, encode_image, image_grid, patchify
from triptych_data.media.rules import read_image_rules

RULES = ImageRules(14, 2, 2, 56 * 56, 28 * 28 * 64)
SMALL = ImageRules(8, 2, 2, 1024, 16384)
QWEN3 = ImageRules(16, 2, 2, 65536, 16777216)  # Qwen3-VL's own


def save(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photo(width, height, mode="RGB"):
    rng = np.random.default_rng(width * height)
    coarse = rng.integers(0, 256, (max(2, height // 8), max(2, width // 8), 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR).convert(mode)


@pytest.mark.parametrize("rules", [RULES, SMALL, QWEN3], ids=["patch 14", "patch 8", "Qwen3-VL"])
@pytest.mark.parametrize(
    "size", [(28, 28), (56, 84), (100, 37), (640, 480), (333, 1000), (9, 9), (300, 4)]
)
def test_patches_equal_transformers(rules, size):
    mean, std = [0.48, 0.45, 0.4], [0.26, 0.27, 0.28]
    stock = Qwen2VLImageProcessor(
        patch_size=rules.patch_size,
        merge_size=rules.merge_size,
        temporal_patch_size=rules.temporal_patch_size,
        size={"shortest_edge": rules.min_pixels, "longest_edge": rules.max_pixels},
        image_mean=mean,
        image_std=std,
    )
    data = save(photo(*size))
    expected = stock(images=[decode_image(data)], return_tensors="pt")
    patches, grid = encode_image(data, rules)
    assert patches.dtype == torch.uint8
    assert [list(grid)] == expected["image_grid_thw"].tolist()
    by_channel = patches.float().reshape(len(patches), 3, -1)
    shift, scale = 255 * torch.tensor(mean)[:, None], 255 * torch.tensor(std)[:, None]
    normal = ((by_channel - shift) / scale).reshape(len(patches), -1)
    torch.testing.assert_close(normal, expected["pixel_values"], rtol=1e-5, atol=1e-5)


def test_grid_is_transformers_smart_resize():
    rng = np.random.default_rng(0)
    for width, height in rng.integers(1, 3000, (500, 2)).tolist():
        if max(width, height) > 200 * min(width, height):
            continue
        rows, cols = smart_resize(height, width, 28, RULES.min_pixels, RULES.max_pixels)
        assert image_grid(width, height, RULES) == (1, rows // 14, cols // 14)


def test_a_bagels_images_are_no_longer_than_its_table():
    """Of whatever shape: the area alone would let an image of 4 to 1 be 32 patches wide."""
    rules, _ = read_image_rules(ROOT / "stages/configs/bagel_tiny")
    assert image_grid(400, 400, rules) == (1, 16, 16)
    assert image_grid(400, 100, rules) == (1, 4, 16)
    assert image_grid(100, 133, rules) == (1, 16, 12)
    assert image_grid(3, 600, rules) == (1, 16, 1)
    for width, height in np.random.default_rng(0).integers(4, 700, (300, 2)).tolist():
        _, rows, cols = image_grid(width, height, rules)
        assert max(rows, cols) <= 16
        if max(width, height) <= 128 and width * height >= 1024:  # as without a table
            assert (rows, cols) == image_grid(width, height, rules._replace(most_side=None))[1:]
    patches, grid = encode_image(save(photo(400, 100)), rules)
    assert grid == (1, 4, 16) and len(patches) == 64


def test_slim_image_is_refused():
    with pytest.raises(ValueError, match="201x1"):
        image_grid(201, 1, RULES)


def test_patch_order_is_blocks_of_one_token():
    rules = ImageRules(1, 2, 1, 1, 100)
    image = torch.arange(16, dtype=torch.uint8).reshape(1, 1, 4, 4).repeat(1, 3, 1, 1)
    assert patchify(image, rules)[:, 0].tolist() == [
        *(0, 1, 4, 5, 2, 3, 6, 7),
        *(8, 9, 12, 13, 10, 11, 14, 15),
    ]


def test_patch_holds_its_frames_within_each_channel():
    first = torch.arange(12, dtype=torch.uint8).reshape(1, 3, 2, 2)
    patch = patchify(torch.cat([first, first + 20]), ImageRules(2, 1, 2, 1, 100))
    frames = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert patch.tolist() == [[x + later for xs in frames for later in (0, 20) for x in xs]]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied(kind, orientation):
    data = encoded_image(40, 24, kind, orientation)
    expected = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    got = decode_image(data).permute(1, 2, 0).numpy()
    assert got.shape == expected.shape
    assert np.abs(got.astype(int) - expected.astype(int)).max() <= 3  # decoders round differently


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparency_is_laid_on_white(mode, kind):
    image = Image.new("RGB", (8, 8), "black").convert(mode)
    image.putalpha(Image.new("L", (8, 8), 0))
    image.paste(Image.new(mode, (4, 8), "black"), (0, 0))
    pixels = decode_image(save(image, kind, **({"lossless": True} if kind == "WEBP" else {})))
    assert (pixels[:, :, :4] == 0).all() and (pixels[:, :, 4:] == 255).all()


def test_transparent_palette_is_laid_on_white():
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30, 200, 100, 0])
    image.putpixel((0, 0), 1)
    pixels = decode_image(save(image, transparency=0))
    assert pixels[:, 0, 0].tolist() == [200, 100, 0]
    assert (pixels[:, 1:, 1:] == 255).all()


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "RGB"])
def test_other_modes_become_rgb(mode):
    kind = "JPEG" if mode == "CMYK" else "PNG"
    image = photo(20, 12).convert(mode)
    expected = np.array(Image.open(io.BytesIO(save(image, kind))).convert("RGB"))
    pixels = decode_image(save(image, kind))
    assert pixels.shape == (3, 12, 20) and pixels.dtype == torch.uint8
    np.testing.assert_array_equal(pixels.permute(1, 2, 0).numpy(), expected)


def test_16_bit_gray_keeps_its_high_byte():
    deep = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    pixels = decode_image(save(Image.fromarray(deep)))
    np.testing.assert_array_equal(pixels[0].numpy(), deep >> 8)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_files_are_refused(kind):
    data = save(photo(64, 48), kind)
    for broken in (b"", b"no image", data[:30], data[: len(data) // 2]):
        with pytest.raises(ValueError, match="must be a whole JPEG, PNG or WebP"):
            decode_image(broken)


def test_a_bomb_is_refused_by_its_header():
    """121 megapixels in 15 kB: no decoder may see them."""
    bomb = save(Image.new("1", (11_000, 11_000)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="11000 x 11000 pixels, over 89478485"):
        decode_image(bomb)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_an_animation_shows_its_first_picture(kind):
    first, second = Image.new("RGB", (16, 8), (200, 10, 10)), Image.new("RGB", (16, 8), (0, 0, 250))
    data = save(first, kind, save_all=True, append_images=[second], lossless=True)
    pixels = decode_image(data)
    assert pixels.shape == (3, 8, 16) and pixels[:, 0, 0].tolist() == [200, 10, 10]


def test_other_formats_are_not_even_tried():
    for kind in ("GIF", "TIFF", "BMP", "PPM"):
        with pytest.raises(ValueError, match="must be a whole JPEG, PNG or WebP"):
            decode_image(save(photo(16, 16), kind))


def test_damage_of_any_kind_is_a_value_error():
    rng = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "WEBP"):
        data = save(photo(64, 48), kind)
        for _ in range(60):
            broken = bytearray(data)
            for at in rng.integers(0, len(data), 4):
                broken[at] = rng.integers(256)
            try:
                pixels = decode_image(bytes(broken))
            except ValueError:
                continue
            assert pixels.dtype == torch.uint8 and pixels.shape[0] == 3
