"""`tools/check_families_gpu.py` passes what rounds, and names what is wrong."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tiny import ROOT
from triptych_models.catalogue import AUTOENCODERS, DENOISERS, FAMILIES
from triptych_models.output import LossOutput

sys.path.insert(0, str(ROOT / "tools"))

from check_families_gpu import NAMES, ROWS, SAMPLES, Step, check, errors, finish, packed

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


@pytest.mark.parametrize("factor", [0.9, 1.1, 0.0, -1.0, math.nan, math.inf])
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


def steps(loss: float, gradient: float, rounded: float) -> tuple[Step, Step, Step]:
    """Truth, plain bf16 and ours, of one gradient of ones."""
    ones = torch.ones(8)
    made = ((1.0, 1.0), (1.0, rounded), (loss, gradient))
    truth, plain, ours = (Step(torch.tensor(x).double(), {"w": y * ones}) for x, y in made)
    return truth, plain, ours


def test_a_wrong_loss_is_named() -> None:
    assert errors(*steps(1.01, 1.0, 1.0)).off == ["the loss"]
    assert errors(*steps(-1.0, 1.0, 1.0)).off == ["the loss"]
    assert errors(*steps(1.0, 1.0, 1.0)).off == []


def test_plain_torch_that_is_no_number_excuses_nothing() -> None:
    assert errors(*steps(1.0, -7.0, math.inf)).off == ["w"]
    assert errors(*steps(1.0, 1.0, 1.0)).blind == 0
    assert errors(*steps(1.0, 1.0, 1.3)).blind == 1


def test_a_case_that_ended_badly_is_no_success(tmp_path: Path) -> None:
    """Whatever an earlier run left."""
    folder = tmp_path / "qwen3"
    folder.mkdir()
    part = {"whole": 0.0, "ratio": 0.1, "blind": 0, "worst": "w", "off": []}
    row = {"loss": 1.0, "norm": 1.0, "ok": True, "plain": part, "ours": part}
    (folder / "found.json").write_text(json.dumps(row))
    folder.with_suffix(".log").write_text("x\nRuntimeError: it fell\n")

    def ended(code: str, seconds: float = 60.0) -> tuple[str, bool]:
        process = subprocess.Popen([sys.executable, "-c", code])
        return finish(process, folder, time.monotonic() + seconds)

    assert ended("")[1]
    line, ok = ended("raise SystemExit(3)")
    assert not ok and "(3): RuntimeError: it fell" in line
    line, ok = ended("import time; time.sleep(60)", 0.1)
    assert not ok and "longer than --timeout" in line


def test_an_earlier_run_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "sit").mkdir()
    words = [sys.executable, "tools/check_families_gpu.py", str(tmp_path), "--small"]
    done = subprocess.run([*words, "--case", "sit"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "must have no sit" in done.stderr


def test_only_these_families_are_not_compared() -> None:
    compared = {case.published for case in ROWS.values()} | set(SAMPLES)
    assert {*FAMILIES, *DENOISERS, *AUTOENCODERS} - compared == {
        "dots1",
        "llava",
        "llava_projector",
    }
    assert len(set(NAMES)) == len(NAMES)
