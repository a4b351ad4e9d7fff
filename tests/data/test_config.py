import subprocess
import sys

import pytest
from pydantic import ValidationError

from triptych_data.config import CostConfig, DataConfig, SourceConfig


def test_defaults_need_only_shards_and_length():
    config = DataConfig(shards=["a.tar"], seq_len=64)
    assert (config.num_workers, config.prefetch, config.window) == (2, 2, None)
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
        {"max_patches": 2**22 + 1},
        {"temperature": 0.01},
        {"sources": {"with space": {"shards": ["b.tar"]}}, "shards": None},
    ],
)
def test_what_cannot_be_meant_is_refused(change):
    with pytest.raises(ValidationError):
        DataConfig(**{"shards": ["a.tar"], "seq_len": 64, **change})


def mixed(a=None, b=None, **settings):
    sources = {
        name: {"shards": [f"{name}.tar"], **source}
        for name, source in (("a", a), ("b", b))
        if source
    }
    return DataConfig(sources=sources, seq_len=64, **settings)


def test_shards_are_the_short_form_of_one_source():
    config = DataConfig(shards=["a.tar", "b.tar"], seq_len=64)
    assert config.named_sources == {"shards": SourceConfig(shards=["a.tar", "b.tar"])}


def test_a_weight_is_a_number_or_points():
    config = mixed({"weight": 2}, {"weight": [[0, 1], [1000, 0]]})
    weights = [source.weights for source in config.named_sources.values()]
    assert weights == [[(0, 2.0)], [(0, 1.0), (1000, 0.0)]]
    assert mixed({"repeat": 2}).named_sources["a"].weights is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "data.shards: must be given, or data.sources instead, got neither"),
        ({"a": {"weight": 1}, "shards": ["x"]}, "got both"),
        ({"a": {"weight": 1}, "b": {"repeat": 2}}, "data.sources.b.weight: must be given as for a"),
        ({"a": {"weight": 1}, "temperature": 2}, "data.temperature: must be null with weights"),
        ({"a": {"weight": 1, "repeat": 2}}, "data.sources.a.repeat: must be 1"),
        ({"a": {"weight": -1}}, "data.sources.a.weight: must be finite and not negative"),
        ({"a": {"weight": float("nan")}}, "data.sources.a.weight: must be finite"),
        ({"a": {"weight": []}}, "must be [[point, weight], …] with ascending points"),
        ({"a": {"weight": [[5, 1], [0, 1]]}}, "with ascending points"),
        ({"a": {"weight": [[5, 1], [5, 2]]}}, "with ascending points"),
        ({"a": {"repeat": 1}, "balance_group": 24}, "data.balance_group: must be a power of two"),
    ],
)
def test_mixtures_that_contradict_themselves_are_refused_by_path(settings, message):
    with pytest.raises(ValidationError) as caught:
        mixed(**settings)
    assert message in str(caught.value)


def test_every_field_is_described():
    for config in (DataConfig, SourceConfig, CostConfig):
        assert all(field.description for field in config.model_fields.values())


def test_config_comes_without_torch():
    code = "import sys, triptych_data.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
