"""A dense Qwen3 becomes a mixture whose logits are its own, tensor by tensor."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

from tests.models import tiny
from tests.tiny import ROOT
from triptych_models.config import ModelConfig
from triptych_models.export import export
from triptych_models.families import build_model
from triptych_models.upcycle import Recipe

sys.path.insert(0, str(ROOT / "tools"))
from upcycle_moe import upcycle


@pytest.fixture(params=["tied", "untied"])
def dense(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Four layers, in two files if untied."""
    tied = request.param == "tied"
    small = tiny.write_text_model_dir(tmp_path / "small", tied=tied)
    config = json.loads((small / "config.json").read_text()) | {"num_hidden_layers": 4}
    (small / "config.json").write_text(json.dumps(config))
    (small / "tokenizer.json").write_text("{}")
    model = build_model(ModelConfig(path=small, init="random"), dtype=torch.float32)
    size = 10**9 if tied else 100_000
    export(model.hf, tmp_path / "dense", small, dtype=torch.float32, max_shard_bytes=size)
    return tmp_path / "dense"


def logits(model: Any) -> torch.Tensor:
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize(
    ("layers", "sparse"),
    [("all", [0, 1, 2, 3]), ("every-second", [1, 3]), ("first-half", [0, 1])],
)
def test_logits_are_the_dense_models(
    dense: Path, tmp_path: Path, layers: Any, sparse: list[int]
) -> None:
    out = tmp_path / "moe"
    upcycle(dense, out, Recipe(4, 2, layers), max_shard_bytes=60_000)
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    found = [i for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")]
    assert found == sparse
    config = json.loads((out / "config.json").read_text())
    assert (config["num_experts"], config["num_experts_per_tok"]) == (4, 2)
    wanted = logits(Qwen3ForCausalLM.from_pretrained(dense))
    torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-5)
    assert (out / "tokenizer.json").read_bytes() == (dense / "tokenizer.json").read_bytes()

    ours = build_model(ModelConfig(path=out), dtype=torch.float32)
    batch = tiny.inputs_only(tiny.pack_text([tiny.document(1, words=30)], 32))
    plain = build_model(ModelConfig(path=dense), dtype=torch.float32)
    torch.testing.assert_close(ours.logits(**batch), plain.logits(**batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("layers", "first"), [("all", 0), ("last-half", 2)])
def test_a_shared_expert_and_the_others_give_half_each(
    dense: Path, tmp_path: Path, layers: Any, first: int
) -> None:
    out = tmp_path / "moe"
    upcycle(dense, out, Recipe(4, 2, layers, shared_expert=True), max_shard_bytes=60_000)
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert type(model).__name__ == "Dots1ForCausalLM"
    found = [i for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")]
    assert found == list(range(first, 4))
    wanted = logits(Qwen3ForCausalLM.from_pretrained(dense))
    torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-5)
    ours = build_model(ModelConfig(path=out), dtype=torch.float32)
    batch = tiny.inputs_only(tiny.pack_text([tiny.document(1, words=30)], 32))
    plain = build_model(ModelConfig(path=dense), dtype=torch.float32)
    torch.testing.assert_close(ours.logits(**batch), plain.logits(**batch), rtol=1e-5, atol=1e-5)


def test_noise_makes_experts_differ_and_nothing_else(dense: Path, tmp_path: Path) -> None:
    for name, noise in (("plain", 0.0), ("noisy", 0.1), ("again", 0.1)):
        upcycle(dense, tmp_path / name, Recipe(3, 1, "all", noise, seed=5))
    plain, noisy, again = (
        load_file(tmp_path / name / "model.safetensors") for name in ("plain", "noisy", "again")
    )
    for name, value in noisy.items():
        assert torch.equal(again[name], value)
        difference = (value - plain[name]).square().mean().sqrt()
        if ".experts." in name:
            share = difference / plain[name].square().mean().sqrt()
            assert float(share) == pytest.approx(0.1, rel=0.1), name
        else:
            assert difference == 0, name
    first, second = (noisy[f"model.layers.0.mlp.experts.{e}.up_proj.weight"] for e in (0, 1))
    assert not torch.equal(first, second)
    routers = [value for name, value in plain.items() if name.endswith("mlp.gate.weight")]
    assert len(routers) == 4
    assert float(torch.cat(routers).std()) == pytest.approx(0.02, rel=0.15)


def test_what_cannot_be_is_refused(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="OUT: must not exist"):
        upcycle(dense, tmp_path / "there", Recipe(4, 2))
    with pytest.raises(ValueError, match=r"--top-k: must lie in 1\.\.4"):
        upcycle(dense, tmp_path / "out", Recipe(4, 5))
    with pytest.raises(ValueError, match=r"--layers: must be all or last-half with --shared-exp"):
        upcycle(dense, tmp_path / "out", Recipe(4, 2, "every-second", shared_expert=True))
    upcycle(dense, tmp_path / "moe", Recipe(2, 1))
    with pytest.raises(ValueError, match="model_type must be qwen3 or qwen3_vl, got qwen3_moe"):
        upcycle(tmp_path / "moe", tmp_path / "out", Recipe(4, 2))
    assert not (tmp_path / "out").exists()


# Peak memory in a process of its own: twice the model must not need more.
PEAK = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from upcycle_moe import upcycle
from triptych_models.upcycle import Recipe
import triptych_models.weights, triptych_models.read_config, triptych_models.export
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
upcycle(Path(sys.argv[2]), Path(sys.argv[3]), Recipe(8, 2))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_is_that_of_a_tensor(tmp_path: Path) -> None:
    small = tiny.write_text_model_dir(tmp_path / "small")
    config = json.loads((small / "config.json").read_text())
    config |= {"hidden_size": 256, "intermediate_size": 4096}  # 4 MiB a matrix, 200 MiB the whole
    (small / "config.json").write_text(json.dumps(config))
    model = build_model(ModelConfig(path=small, init="random"), dtype=torch.float32)
    export(model.hf, tmp_path / "dense", small, dtype=torch.float32)
    words = [sys.executable, "-c", PEAK, ROOT / "tools", tmp_path / "dense", tmp_path / "moe"]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    written = (tmp_path / "moe/model.safetensors").stat().st_size
    assert written > 190 * 2**20
    assert int(done.stdout) * 1024 < 60 * 2**20  # the dense file is mapped: 26 MiB of that
