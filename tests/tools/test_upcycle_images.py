"""A dense Qwen3-VL becomes a Qwen3-VL-MoE with its logits; routers begin with tokens of data."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from tests.models import tiny
from tests.models.stock import stock_logits
from tests.tiny import ROOT, make_model_dir, make_shards
from triptych_data.config import DataConfig
from triptych_data.loader import PackLoader
from triptych_data.processor import Processor
from triptych_models.config import ModelConfig
from triptych_models.export import export
from triptych_models.families import build_model
from triptych_models.router_init import find_clusters, router_rows
from triptych_models.upcycle import Recipe

sys.path.insert(0, str(ROOT / "tools"))
import upcycle_moe
from upcycle_moe import upcycle


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    small = make_model_dir(tmp_path / "small")
    model = build_model(ModelConfig(path=small, init="random"), dtype=torch.float32)
    export(model.hf, tmp_path / "dense", small, dtype=torch.float32, max_shard_bytes=400_000)
    return tmp_path / "dense"


@pytest.mark.parametrize(
    ("layers", "sparse"),
    [("all", [0, 1, 2]), ("every-second", [1]), ("first-half", [0])],
)
def test_logits_are_the_dense_models(
    dense: Path, tmp_path: Path, layers: Any, sparse: list[int]
) -> None:
    upcycle(dense, tmp_path / "moe", Recipe(4, 2, layers))
    stock, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "moe", output_loading_info=True
    )
    assert not any(info.values()), info
    found = stock.model.language_model.layers
    assert [i for i, layer in enumerate(found) if hasattr(layer.mlp, "experts")] == sparse
    ours = build_model(ModelConfig(path=tmp_path / "moe"), dtype=torch.float32).eval()
    plain = build_model(ModelConfig(path=dense), dtype=torch.float32).eval()
    batch = row(dense, make_shards(tmp_path / "data", 6))
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(**batch), plain.logits(**batch))
        document = tiny.document(1, words=20)
        wanted = stock_logits(AutoModelForImageTextToText.from_pretrained(dense), plain, document)
        torch.testing.assert_close(stock_logits(stock, ours, document), wanted)


def row(model: Path, shards: Path, seq_len: int = 512) -> dict[str, Any]:
    """The first packed row of shards, as `hidden_states` takes it."""
    config = DataConfig(shards=[str(shards)], seq_len=seq_len, num_workers=0)
    batch = next(iter(PackLoader(config, Processor.from_directory(model), rank=0, world_size=1)))
    unseen = ("sample_keys", "sample_ids", "num_tokens", "holes", "place")
    return tiny.inputs_only({name: x for name, x in batch.items() if name not in unseen})


def test_stacks_of_square_matrices_are_stored_as_stock_reads_them(tmp_path: Path) -> None:
    # 2F = H: transformers goes by the shape, and leaves such a stack as it is.
    small = make_model_dir(tmp_path / "small")
    config = json.loads((small / "config.json").read_text())
    config["text_config"]["intermediate_size"] = config["text_config"]["hidden_size"] // 2
    (small / "config.json").write_text(json.dumps(config))
    model = build_model(ModelConfig(path=small, init="random"), dtype=torch.float32)
    export(model.hf, tmp_path / "dense", small, dtype=torch.float32)
    upcycle(tmp_path / "dense", tmp_path / "moe", Recipe(2, 1, noise=0.1))
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "moe")
    ours = build_model(ModelConfig(path=tmp_path / "moe"), dtype=torch.float32)
    for name, parameter in stock.named_parameters():
        assert torch.equal(ours.hf.get_parameter(name), parameter), name
    first = "model.language_model.layers.0.mlp"
    gate = model.hf.get_parameter(f"{first}.gate_proj.weight")
    copy = stock.get_parameter(f"{first}.experts.gate_up_proj")[1, : len(gate)]
    assert 0.05 < (copy - gate).norm() / gate.norm() < 0.2


def test_routers_from_data_give_each_expert_a_cluster_of_its_layers_tokens(
    dense: Path, tmp_path: Path
) -> None:
    shards = make_shards(tmp_path / "data", 12)
    words = [dense, tmp_path / "moe", "--experts=4", "--router-tokens=512"]
    words += [f"--router-from={shards}", "--seed=3"]
    done = CliRunner().invoke(upcycle_moe.main, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    facts = json.loads((tmp_path / "moe/upcycling.json").read_text())
    assert (facts["router_from"], facts["router_tokens"]) == ([str(shards)], 512)

    # What each layer's MLP reads in the whole dense model, with everything in memory.
    plain = build_model(ModelConfig(path=dense), dtype=torch.float32).eval()
    seen: list[torch.Tensor] = []
    for layer in plain.hf.model.language_model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, given: seen.append(given[0][0]))
    config = DataConfig(shards=[str(shards)], seq_len=512, num_workers=0, seed=3)
    processor = Processor.from_directory(dense)
    batch = next(iter(PackLoader(config, processor, rank=0, world_size=1)))
    unseen = ("sample_keys", "sample_ids", "holes", "place", "num_tokens")
    inputs = tiny.inputs_only({name: x for name, x in batch.items() if name not in unseen})
    with torch.no_grad():
        plain.hidden_states(**inputs)
    weights = load_file(tmp_path / "moe/model.safetensors")
    assert len(seen) == 3
    for number, x in enumerate(seen):
        x = x[: batch["num_tokens"]]
        centroids = find_clusters(x, 4, torch.Generator().manual_seed(3 + number))
        router = weights[f"model.language_model.layers.{number}.mlp.gate.weight"]
        torch.testing.assert_close(router, router_rows(x, centroids, 0.02), rtol=1e-3, atol=1e-5)
        own = (torch.nn.functional.normalize(x, dim=-1) @ centroids.T).argmax(-1)
        assert ((x @ router.T).argmax(-1) == own).float().mean() > 0.99
        assert own.unique().tolist() == [0, 1, 2, 3]


def test_clusters_that_are_there_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    ways = torch.nn.functional.normalize(torch.randn(5, 32, generator=generator), dim=-1)
    which = torch.arange(400) % 5
    x = 3 * ways[which] + 0.1 * torch.randn(400, 32, generator=generator)
    centroids = find_clusters(x, 5, generator)
    matched = (ways @ centroids.T).max(-1)
    assert sorted(matched.indices.tolist()) == [0, 1, 2, 3, 4] and matched.values.min() > 0.98
    logits = x @ router_rows(x, centroids, 0.02).T
    assert torch.equal(matched.indices[which], logits.argmax(-1))
    wanted = 0.02 * x.square().sum(-1).mean().sqrt()
    torch.testing.assert_close(logits.square().mean().sqrt(), wanted)
    alike = torch.ones(6, 8)  # fewer different tokens than clusters
    assert find_clusters(alike, 3, generator).isfinite().all()


def test_too_few_tokens_are_refused(dense: Path, tmp_path: Path) -> None:
    shards = [str(make_shards(tmp_path / "data", 2))]
    with pytest.raises(ValueError, match="must hold at least a token for each of 900 experts"):
        upcycle(dense, tmp_path / "moe", Recipe(900, 1), (shards, 512))
    assert not (tmp_path / "moe").exists()
