import subprocess
import sys

import pytest
from pydantic import ValidationError

from triptych_data.config import DataConfig


def test_defaults_need_only_shards_and_length():
    config = DataConfig(shards=["a.tar"], seq_len=64)
    assert (config.num_workers, config.prefetch, config.open_bins) == (2, 2, 16)
    assert config.max_patches is None and config.long_samples == "refuse"


@pytest.mark.parametrize(
    "change",
    [
        {"shards": []},
        {"seq_len": 0},
        {"num_workers": -1},
        {"prefetch": 0},
        {"long_samples": "cut"},
        {"min_pixels": 1024, "max_pixels": 512},
        {"sequence_length": 64},
    ],
)
def test_what_cannot_be_meant_is_refused(change):
    with pytest.raises(ValidationError):
        DataConfig(**{"shards": ["a.tar"], "seq_len": 64, **change})


def test_every_field_is_described():
    assert all(field.description for field in DataConfig.model_fields.values())


def test_config_comes_without_torch():
    code = "import sys, triptych_data.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
