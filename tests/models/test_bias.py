"""Biases that choose experts: they even out a skewed load, and stay fp32 whatever is cast."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.models import tiny
from triptych_models.config import ModelConfig
from triptych_models.dots1 import Dots1
from triptych_models.expert_weights import router_biases
from triptych_models.families import build_model


def skewed(path: Path, rate: float) -> Dots1:
    """Eight experts of which all tokens choose the first two, until biases change that."""
    folder = tiny.write_dots1_model_dir(path / "model", n_routed_experts=8)
    moe = {"aux_loss": 0.0, "bias_rate": rate}
    config = ModelConfig(path=folder, init="random", moe=moe)  # type: ignore[arg-type]
    model = build_model(config, dtype=torch.float32)
    assert isinstance(model, Dots1)
    for block in model.blocks():
        torch.nn.init.normal_(block.gate.weight, std=0.05)
        block.gate.e_score_correction_bias[:2] = 0.3  # type: ignore[index]
    return model.train()


def largest_shares(model: Dots1, steps: int, taken: float = 1.0) -> list[float]:
    """The busiest expert's share of a layer's choices, step by step, at worst of the layers."""
    batch = tiny.pack_text([tiny.document(seed, words=31) for seed in range(3)], 96)
    found = []
    with torch.no_grad():
        for _ in range(steps):
            figures = model(**batch).metrics
            load = figures["expert_load"]
            found.append(float((load.amax(1) / load.sum(1)).max()))
            model.after_update(figures, torch.tensor(taken))
    return found


def test_a_skewed_load_becomes_even(tmp_path: Path) -> None:
    shares = largest_shares(skewed(tmp_path, 0.01), 60)
    assert shares[0] == 0.5 and shares[-1] < 0.2  # 0.125 were even


def test_without_a_rate_or_an_update_biases_stay(tmp_path: Path) -> None:
    for rate, taken in ((0.0, 1.0), (0.01, 0.0)):
        model = skewed(tmp_path / str(rate), rate)
        before = {name: bias.clone() for name, bias in router_biases(model).items()}
        assert largest_shares(model, 3, taken) == [0.5] * 3
        assert len(before) == 2
        for name, bias in router_biases(model).items():
            assert torch.equal(bias, before[name])


def test_biases_stay_fp32(tmp_path: Path) -> None:
    model = skewed(tmp_path, 0.001)
    biases = router_biases(model)
    kept = [bias.fill_(1 + 2**-20).clone() for bias in biases.values()]
    model.bfloat16()
    assert model.blocks()[0].gate.weight.dtype == torch.bfloat16
    for bias, was in zip(router_biases(model).values(), kept, strict=True):
        assert torch.equal(bias, was)


def test_a_rate_is_refused_where_there_is_no_bias(tmp_path: Path) -> None:
    moe = {"bias_rate": 0.001}
    without = tiny.write_moe_model_dir(tmp_path / "without")
    with pytest.raises(ValueError, match=r"bias_rate: must be 0 for a model whose experts have no"):
        ModelConfig(path=without, moe=moe).check_path()  # type: ignore[arg-type]
    folder = tiny.write_dots1_model_dir(tmp_path / "with")
    with pytest.raises(ValueError, match=r"bias_rate: must be 0 with model\.freeze=\[router\]"):
        ModelConfig(path=folder, moe=moe, freeze=["router"]).check_path()  # type: ignore[arg-type]
