import types

import numpy as np
import pytest
import torch
from transformers import LlavaOnevisionImageProcessor
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_onevision.modeling_llava_onevision import (
    LlavaOnevisionModel,
    unpad_image,
)
from transformers.models.llava_onevision.processing_llava_onevision import (
    LlavaOnevisionProcessor,
)

from tests.data.test_images import photo, save
from triptych_data.media.images import decode_image
from triptych_data.media.tiling import (
    TilingRules,
    best_resolution,
    encode_tiles,
    square_tile,
    tile_image,
    tile_layout,
)

# Pinpoints of up to 4 x 4 tiles of 28 pixels, whose tower gives 4 x 4 features.
RULES = TilingRules(
    28, 4, tuple((28 * h, 28 * w) for h in range(1, 5) for w in range(1, 5)), max_tiles=3
)
MEAN, STD = [0.48, 0.45, 0.4], [0.26, 0.27, 0.28]
SIZES = [(28, 28), (100, 37), (64, 48), (333, 120), (9, 9), (300, 4), (57, 112), (112, 112)]


def stock():
    return LlavaOnevisionImageProcessor(
        size={"height": RULES.tile, "width": RULES.tile},
        image_grid_pinpoints=[list(size) for size in RULES.resolutions],
        image_mean=MEAN,
        image_std=STD,
    )


def normal(tiles):
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (MEAN, STD))
    return (tiles / 255 - mean) / std


@pytest.mark.parametrize("size", SIZES)
def test_tiles_equal_transformers(size):
    data = save(photo(*size))
    expected = stock()(images=[decode_image(data)], return_tensors="pt")
    tiles, layout = encode_tiles(data, RULES)
    assert tiles.dtype == torch.uint8 and len(tiles) == 1 + layout.grid[0] * layout.grid[1]
    assert expected["image_sizes"].tolist() == [[size[1], size[0]]]
    torch.testing.assert_close(normal(tiles), expected["pixel_values"][0], rtol=1e-5, atol=1e-5)


def test_one_of_several_images_is_squared_as_in_transformers():
    images = [decode_image(save(photo(*size))) for size in SIZES]
    expected = stock()(images=[images], return_tensors="pt")["pixel_values"]
    background = tuple(int(255 * x) for x in MEAN)
    for image, theirs in zip(images, expected, strict=True):
        tile = square_tile(image, RULES.tile, background)
        torch.testing.assert_close(normal(tile[None]), theirs, rtol=1e-5, atol=1e-5)


def test_resolution_is_transformers_choice_for_any_size():
    rng = np.random.default_rng(0)
    for width, height in rng.integers(1, 2000, (2000, 2)).tolist():
        expected = select_best_resolution((height, width), RULES.resolutions)
        assert best_resolution(width, height, RULES.resolutions) == expected


def test_layout_counts_and_keeps_what_the_stock_model_does():
    """Number of tokens by stock's processor; features kept by its `pack_image_features`."""
    processor = types.SimpleNamespace(
        image_processor=stock(), num_image_tokens=RULES.side**2, vision_aspect_ratio="anyres_max_3"
    )
    processor._get_unpadded_features = LlavaOnevisionProcessor._get_unpadded_features.__get__(
        processor
    )
    config = types.SimpleNamespace(
        vision_config=types.SimpleNamespace(image_size=RULES.tile, patch_size=7),
        image_grid_pinpoints=[list(size) for size in RULES.resolutions],
    )
    model = types.SimpleNamespace(config=config)
    rng = np.random.default_rng(1)
    shrinks = 0
    for width, height in rng.integers(1, 500, (500, 2)).tolist():
        layout = tile_layout(width, height, RULES)
        count = LlavaOnevisionProcessor._get_number_of_features(
            processor, height, width, RULES.tile, RULES.tile
        )
        assert layout.num_tokens == count
        rows, cols = (RULES.side * n for n in layout.grid)
        features = torch.arange(rows * cols).view(1, rows, cols)
        top, left, kept_rows, kept_cols = layout.kept
        expected = unpad_image(features, (height, width))
        assert torch.equal(features[:, top : top + kept_rows, left : left + kept_cols], expected)
        tower = torch.rand(1 + layout.grid[0] * layout.grid[1], RULES.side**2, 2)
        packed, lengths = LlavaOnevisionModel.pack_image_features(
            model,
            [tower],
            torch.tensor([[height, width]]),
            image_newline=torch.zeros(2),
            vision_aspect_ratio="anyres_max_3",
        )
        assert lengths.tolist() == [layout.num_tokens] == [len(packed[0])]
        shrinks += layout.shrunk != layout.kept[2:]
    assert 50 < shrinks < 450


def test_tiles_hold_the_image_and_black_beside_it():
    image = torch.full((3, 56, 28), 200, dtype=torch.uint8)
    rules = TilingRules(28, 4, ((56, 56),))
    layout = tile_layout(28, 56, rules)
    tiles = tile_image(image, layout, rules)
    assert layout.grid == (2, 2) and layout.size == (56, 28) and layout.kept == (0, 2, 8, 4)
    assert (tiles[0] == 200).all()
    for left, right in ((tiles[1], tiles[2]), (tiles[3], tiles[4])):
        assert (left[:, :, :14] == 0).all() and (left[:, :, 14:] == 200).all()
        assert (right[:, :, :14] == 200).all() and (right[:, :, 14:] == 0).all()


def test_damaged_files_are_refused():
    with pytest.raises(ValueError, match="must be a whole JPEG, PNG or WebP"):
        encode_tiles(b"no image", RULES)
