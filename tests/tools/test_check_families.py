"""The comparison of `tools/check_families_gpu.py` passes what rounds, and names what is wrong."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tiny import ROOT
from triptych_models.output import LossOutput

sys.path.insert(0, str(ROOT / "tools"))

from check_families_gpu import NAMES, ROWS, check, packed

BATCH = {"x": torch.randn(64, 32, generator=torch.Generator().manual_seed(0)), "num_targets": 64}


class Tiny(nn.Module):
    """Two products; the gradient of the second is `spoilt`."""

    def __init__(self, spoilt: Any) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 48), nn.Linear(48, 16)
        if spoilt is not None:
            self.second.weight.register_hook(spoilt)

    def forward(self, x: Tensor, num_targets: int) -> LossOutput:
        out = self.second(self.first(x.to(self.first.weight.dtype)).tanh())
        return LossOutput(out.float().square().sum(), num_targets, {})


def found(spoilt: Any = None) -> dict[str, Any]:
    def build(dtype: torch.dtype, plain: bool) -> nn.Module:
        torch.manual_seed(0)
        model = Tiny(None if plain else spoilt).to(torch.bfloat16)
        return model.to(dtype)

    return check(build, BATCH)


def test_rounding_passes() -> None:
    row = found()
    assert row["ok"] and row["ours"]["off"] == []
    assert 0 < row["ours"]["whole"] < 0.01


@pytest.mark.parametrize("factor", [0.9, 1.1, -1.0, math.nan])
def test_a_gradient_that_is_wrong_is_named(factor: float) -> None:
    """As of a sum that lost a tenth, or was taken over memory as it was found."""
    row = found(lambda gradient: gradient * factor)
    assert not row["ok"]
    assert row["ours"]["worst"] == "second.weight"
    assert row["ours"]["off"] == ["second.weight"]


def test_one_element_of_many_is_seen() -> None:
    def spoil(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[3, 5] += gradient.norm()
        return gradient

    assert found(spoil)["ours"]["off"] == ["second.weight"]


def test_a_gradient_that_is_missing_is_named() -> None:
    def build(dtype: torch.dtype, plain: bool) -> nn.Module:
        model = Tiny(None).to(dtype)
        model.first.bias.requires_grad_(plain)
        return model

    row = check(build, BATCH)
    assert not row["ok"] and "first.bias" in row["ours"]["worst"]


def test_a_family_is_built_alike_in_both_dtypes(tmp_path: Path) -> None:
    """The truth has the weights of what is compared with it, to the bit."""
    shrunken = (*ROWS["qwen3"].values, "hidden_size=64", "intermediate_size=64", "vocab_size=128")
    case = ROWS["qwen3"]._replace(values=shrunken)
    build, batch = packed(tmp_path, case, 64)
    truth, ours = build(torch.float32, True), build(torch.bfloat16, True)
    for (name, wanted), (_, got) in zip(
        truth.named_parameters(), ours.named_parameters(), strict=True
    ):
        assert wanted.dtype == torch.float32 and got.dtype == torch.bfloat16
        assert torch.equal(wanted, got.float()), name
    assert check(build, batch)["ok"]
    assert len(set(NAMES)) == len(NAMES)
