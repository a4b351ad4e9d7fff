import numpy as np
import pytest
import torch
from transformers import AutoConfig, Qwen3VLModel

from tests.data.packs import MODEL
from triptych_data.media.positions import mrope_positions


@pytest.fixture(scope="module")
def stock():
    config = AutoConfig.from_pretrained(MODEL, local_files_only=True)
    with torch.device("meta"):
        return Qwen3VLModel(config)


IMAGES = {"a": (1, 4, 6), "b": (1, 2, 2), "c": (1, 8, 2), "d": (1, 2, 10)}


@pytest.mark.parametrize(
    "layout", ["...", "..a...", "a....", "...c", ".a.b.c..", "d.d.d", "b", ".", "a.b"]
)
def test_positions_equal_transformers(stock, layout):
    grids = np.array([IMAGES[c] for c in layout if c != "."], dtype=np.int64).reshape(-1, 3)
    kinds = [[0] * 3 if c == "." else [1] * (np.prod(IMAGES[c]) // 4) for c in layout]
    is_image = np.array([kind for run in kinds for kind in run])
    expected, _ = stock.get_rope_index(
        torch.from_numpy(is_image)[None],
        torch.from_numpy(is_image)[None],
        image_grid_thw=torch.from_numpy(grids) if len(grids) else None,
    )
    got = mrope_positions(is_image == 1, grids, 2)
    assert got.dtype == np.int64
    np.testing.assert_array_equal(got, expected[:, 0].numpy())


def test_neighbouring_images_follow_each_other():
    got = mrope_positions(np.ones(2, dtype=bool), np.array([[1, 2, 2]] * 2), 2)
    assert got.tolist() == [[0, 1]] * 3
