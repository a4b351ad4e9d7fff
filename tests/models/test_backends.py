"""What a run says of ops that do not run on their fastest backend."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.models.proofs import PROOFS
from tests.models.test_families import tiny_config
from triptych_kernels.dispatch import use_backend
from triptych_models.backends import backends, dear_ops
from triptych_models.families import build_shell

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", PROOFS)
def test_every_family_names_its_dear_ops(tmp_path: Path, family: str) -> None:
    with torch.device("meta"):
        model = build_shell(tiny_config(family, tmp_path), dtype=torch.float32)
    ops, parts = dear_ops(model), model.parts()
    assert ("attention of vision" in ops) == ("vision" in parts)
    assert ("attention of audio" in ops) == ("audio" in parts)
    assert ("moe_mlp" in ops) == ("experts" in parts)
    linear = [m for m in model.hf.modules() if "GatedDelta" in type(m).__name__]
    assert ("gated_delta_rule" in ops) == bool(linear)
    said = backends(model, CPU, torch.float32)
    assert said.keys() == ops.keys()
    assert all("not " in line for name, line in said.items() if name != "moe_mlp")


def test_the_reason_is_of_the_fastest_and_what_is_asked_for_is_named(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = build_shell(tiny_config("qwen3_5_text", tmp_path), dtype=torch.float32)
    line = backends(model, CPU, torch.float32)["gated_delta_rule"]
    assert line.startswith("chunked (not fla: ")
    with use_backend(gated_delta_rule="reference"):
        assert backends(model, CPU, torch.float32)["gated_delta_rule"].startswith("reference (not")
