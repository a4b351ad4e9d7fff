import pytest
import torch

from triptych_models.vision import position_tables

vision_utils = pytest.importorskip("transformers.vision_utils")  # absent before transformers 5.6

GRIDS = torch.tensor([[1, 4, 6], [2, 8, 2], [1, 2, 2], [3, 10, 14]])


def test_position_tables_equal_transformers() -> None:
    tables = position_tables(GRIDS, side=5, merge_size=2)
    indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(
        GRIDS, num_grid_per_side=5, mode="bilinear", align_corners=True, spatial_merge_size=2
    )
    coordinates = vision_utils.get_vision_position_ids(GRIDS, 2)
    assert torch.equal(tables.indices, indices)
    torch.testing.assert_close(tables.weights, weights)
    assert torch.equal(tables.coordinates, coordinates)
