"""Adapters through peft: gradients as in stock peft, checkpoints, directories that stock loads."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401  once, and not on every rank
import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3VLForConditionalGeneration

from tests.models import tiny
from tests.models.stock import stock_loss, stock_twin
from tests.ranks import run_ranks
from tests.stages import one_step
from tests.stages.rows import build, documents, norm_of
from tests.stages.test_pretrain import make_text_model_dir
from tests.stages.test_sft import metrics, overrides, run_stage
from tests.tiny import ROOT, make_model_dir, make_shards
from triptych_core.averaging.sources import open_source
from triptych_models import lora
from triptych_models.config import LoraConfig, ModelConfig
from triptych_models.export import export
from triptych_models.families import build_model

STAGES = {"lora": (0, 1, 2, 3), "dora": (1, 3), "nf4": (0, 1, 2, 3)}
KINDS = {
    "lora": LoraConfig(rank=3, alpha=4, targets=["language", "vision", "projector"]),
    "dora": LoraConfig(rank=3, alpha=4, targets=["language", "qkv"], dora=True),
}
if find_spec("bitsandbytes"):
    targets = ["language", "vision", "projector"]
    KINDS["nf4"] = LoraConfig(rank=3, alpha=4, targets=targets, quantize="nf4")


def words_of(config: LoraConfig) -> list[str]:
    return [
        f"model.lora.rank={config.rank}",
        f"model.lora.alpha={config.alpha}",
        f"model.lora.targets=[{','.join(config.targets)}]",
        f"model.lora.dora={str(config.dora).lower()}",
        f"model.lora.quantize={config.quantize or 'null'}",
    ]


def no_zeros(shapes: dict[str, torch.Size], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """In the place of `first_values`: with up matrices of 0, down matrices have no gradients."""
    names = ("lora_A.weight", "lora_B.weight")
    return {name: torch.randn(shapes[name], generator=generator) * 0.3 for name in names}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.write_model_dir(tmp_path_factory.mktemp("lora") / "model", tied=True)


@pytest.fixture
def adapted(folder, tmp_path, monkeypatch) -> dict[str, tuple[Any, Any]]:
    """Of each kind: our model, and stock peft's with the same base and our adapter's directory."""
    monkeypatch.setattr(lora, "first_values", no_zeros)
    found = {}
    for kind, config in KINDS.items():
        model = build(folder)
        stock = stock_twin(model)
        lora.add_adapters(model, config, 3)
        if config.quantize:  # to stock, linears of the weights that four bits stand for
            for name, layer in lora.adapted_layers(model.hf):
                stock.get_submodule(name).weight.data = layer.base_layer.weight.clone()
        lora.export_adapter(model.hf, config, tmp_path / kind, folder)
        theirs = peft.PeftModel.from_pretrained(stock, tmp_path / kind, is_trainable=True)
        found[kind] = model, theirs
    return found


def steps(folder: Path, out: Path, kind: str) -> list[one_step.Step]:
    runs = [
        [
            *words_of(KINDS[kind]),
            "engine.precision=fp32",
            f"engine.zero.stage={stage}",
            f"engine.checkpointing={'full' if stage == 3 else 'none'}",
        ]
        for stage in STAGES[kind]
    ]
    return one_step.on_a_rank(folder, out, runs)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_stock_peft(folder, adapted, tmp_path, kind):
    model, stock = adapted[kind]
    chosen = [document for row in documents()[:2] for document in row]
    targets = sum(int((document.shift_labels != -100).sum()) for document in chosen)
    loss = stock_loss(stock, model, chosen) / targets
    loss.backward()
    wanted = {
        "hf." + name.removeprefix("base_model.model."): p.grad
        for name, p in stock.named_parameters()
        if p.requires_grad
    }
    assert len(wanted) == (3 if kind == "dora" else 2) * len(list(lora.adapted_layers(model.hf)))
    norm = norm_of(wanted)
    for rank in run_ranks(steps, 2, folder, tmp_path / "runs", kind):
        for stage, step in zip(STAGES[kind], rank, strict=True):
            assert step.line["loss"] == pytest.approx(loss.item(), rel=1e-5)
            assert step.line["grad_norm"] == pytest.approx(norm, rel=1e-5)
            assert step.gradients.keys() == wanted.keys()
            for name, gradient in step.gradients.items():
                size = max(wanted[name].norm().item(), 1e-3 * norm)
                error = (gradient.tensor - wanted[name]).norm().item() / size
                assert error < 1e-5, f"stage {stage}: {name} off by {error:.1e}"


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_export_is_what_stock_peft_computes(folder, adapted, tmp_path, kind):
    model, theirs = adapted[kind]
    export(model.hf, tmp_path / "merged", folder, dtype=torch.float32)
    merged = load_file(tmp_path / "merged/model.safetensors")
    wanted = dict(theirs.merge_and_unload().named_parameters())
    assert merged.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(merged[name], value, rtol=1e-5, atol=1e-6)
    stock = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path / "merged")
    ids = torch.arange(3, 30)[None]
    batch = tiny.inputs_only(tiny.pack([tiny.document(1, words=30)], 64))
    ours = model.logits(**batch)
    again = build_model(ModelConfig(path=tmp_path / "merged"), dtype=torch.float32)
    torch.testing.assert_close(again.logits(**batch), ours, rtol=1e-4, atol=1e-4)
    assert stock(input_ids=ids).logits.isfinite().all()


def test_adapters_begin_with_the_outputs_of_the_base_and_cost_their_own_products(folder):
    batch = tiny.inputs_only(tiny.pack([tiny.document(1, words=9)], 32))
    whole = tiny.pack([tiny.document(1, words=9)], 32)
    for config in KINDS.values():
        model = build(folder)
        before, all_train = model.logits(**batch), model.flops(whole)
        lora.add_adapters(model, config, 3)
        if not config.quantize:
            torch.testing.assert_close(model.logits(**batch), before, rtol=1e-5, atol=1e-6)
        layers = [layer for _, layer in lora.adapted_layers(model.hf)]
        language = [n for n, _ in lora.adapted_layers(model.hf) if "language_model" in n]
        assert len(language) == 14 < len(layers)
        assert model.flops(whole) < all_train
        assert model.fingerprint()["lora"]["alpha"] == 4  # a resume with another is refused
    rank_1 = LoraConfig(rank=1, targets=["q_proj"])
    rank_5 = LoraConfig(rank=5, targets=["q_proj"])
    costs = []
    for config in (rank_1, rank_5):
        model = build(folder)
        lora.add_adapters(model, config, 3)
        costs.append(model.flops(whole))
    assert costs[1] - costs[0] == 4 * 6 * 2 * (32 + 64) * 32  # ranks, passes, layers, widths, T


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("lora-stage")
    make_model_dir(path / "config")
    model = build_model(ModelConfig(path=path / "config", init="random"), dtype=torch.float32)
    export(model.hf, path / "model", path / "config", dtype=torch.float32)
    make_shards(path / "train", 30, seed=1)
    return path


def test_a_run_is_resumed_under_another_stage_and_loads_in_stock_peft(workspace):
    run = workspace / "run"
    words = [
        *overrides(workspace, run, "run.steps=3", "checkpoint.every=2", "evaluation.shards=[]"),
        *("model.init=pretrained", "model.lora.rank=4", "model.lora.dora=true"),
    ]
    run_ranks(run_stage, 2, [*words, "engine.zero.stage=3"])
    kept = load_file(run / "adapter/adapter_model.safetensors")
    shutil.rmtree(run / "checkpoints/step-000003")
    more = ["engine.zero.stage=1", "engine.gradient_accumulation_steps=2"]
    run_ranks(run_stage, 1, [*words, *more])
    adapter = load_file(run / "adapter/adapter_model.safetensors")
    assert adapter.keys() == kept.keys()
    for name, value in adapter.items():
        torch.testing.assert_close(value, kept[name], rtol=1e-3, atol=1e-4)
    lines = metrics(run)
    assert lines[-1]["loss"] < lines[0]["loss"]

    # An average of A and B is not that of B A: the averager refuses both.
    for name, message in (
        ("checkpoints/step-000003", "adapters beside"),
        ("adapter", "an adapter"),
    ):
        with pytest.raises(ValueError, match=rf"must hold whole weights, got {message}"):
            open_source(run / name)

    base = Qwen3VLForConditionalGeneration.from_pretrained(workspace / "model")
    merged = Qwen3VLForConditionalGeneration.from_pretrained(run / "export")
    assert json.loads((run / "adapter/adapter_config.json").read_text())["use_dora"]
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        before = base(input_ids=ids).logits
        found = peft.PeftModel.from_pretrained(base, run / "adapter")(input_ids=ids).logits
        torch.testing.assert_close(merged(input_ids=ids).logits, found, rtol=1e-4, atol=1e-5)
    assert (found - before).abs().max() > 1e-2


def test_pretraining_takes_adapters_and_the_plan_knows_them(tmp_path):
    from tests.stages.test_pretrain import make_documents
    from tests.stages.test_pretrain import overrides as pretrain_overrides

    make_text_model_dir(tmp_path / "model")
    make_documents(tmp_path / "data", 30)
    words = pretrain_overrides(tmp_path, tmp_path / "run", "run.steps=3", "model.lora.rank=2")
    words += ["model.lora.merge=false", "evaluation.shards=[]", "engine.zero.stage=auto"]
    run_ranks(pretrain, 1, words)  # auto: by the plan
    assert not (tmp_path / "run/export").exists()
    base = build_model(ModelConfig(path=tmp_path / "model", init="random"), dtype=torch.float32)
    export(base.hf, tmp_path / "base", tmp_path / "model", dtype=torch.float32)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(stock, tmp_path / "run/adapter")
    assert sum(p.numel() for n, p in theirs.named_parameters() if "lora_" in n) > 0


def pretrain(words: list[str]) -> None:
    from tests.stages.test_pretrain import pretrain_stage
    from triptych_core.config import load_config

    stage = pretrain_stage()
    stage.main(load_config(stage.PretrainConfig, None, words))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.freeze=[vision]"], r"model\.freeze: must be left out with model\.lora"),
        (
            ["parallel.tensor=2", "engine.zero.stage=1"],
            r"parallel\.tensor: must be left out with model\.lora, got 2",
        ),
        (["model.compile=layers"], r"model\.compile: must be left out with model\.lora"),
        (["model.lora.dropout=0.1"], r"model\.lora\.dropout"),
        (["model.lora.quantize=4bit"], r"model\.lora\.quantize"),
    ],
)
def test_what_cannot_be_is_refused(workspace, words, message):
    with pytest.raises(ValueError, match=message):
        run_stage([*overrides(workspace, workspace / "no"), "model.lora.rank=2", *words])


def test_targets_that_there_are_not_are_refused(folder):
    model = build(folder)
    with pytest.raises(ValueError, match=r"model\.lora\.targets: must name .* got 'q_prj'"):
        lora.add_adapters(model, LoraConfig(targets=["q_prj"]), 0)
    with pytest.raises(ValueError, match=r"must be false for linears outside of layers"):
        lora.add_adapters(model, LoraConfig(targets=["projector"], dora=True), 0)
    assert (ROOT / "packages/models/pyproject.toml").read_text().count("peft") == 1
