"""Adapters beside weights in four bits: bytes as stock's, runs that resume, what stock loads."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401  once, and not on every rank
import pytest
import torch
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig, Qwen3VLForConditionalGeneration

from tests.models import tiny
from tests.ranks import run_ranks
from tests.stages import one_step
from tests.stages.test_lora import words_of
from tests.stages.test_sft import metrics, overrides, run_stage
from tests.tiny import make_model_dir, make_shards, sft_stage
from triptych_core.config import load_config
from triptych_models import lora
from triptych_models.config import LoraConfig, ModelConfig
from triptych_models.export import export
from triptych_models.families import build_model
from triptych_models.freeze import count_parameters
from triptych_models.pretend import build_pretend_model

QLORA = LoraConfig(rank=2, alpha=4, targets=["language", "qkv"], quantize="nf4", dora=True)
RUNS = [
    [*words_of(QLORA), f"engine.precision={precision}", f"engine.zero.stage={stage}", *more]
    for precision, stage, more in (
        ("bf16", 0, []),
        ("bf16", 2, []),
        ("bf16", 3, ["engine.checkpointing=full"]),
        ("bf16", 3, ["engine.zero.offload_params=true"]),
    )
]


def test_it_says_what_must_be_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    folder = tiny.write_model_dir(tmp_path / "model", tied=True)
    model = build_model(ModelConfig(path=folder, init="random"), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"quantize: must have bitsandbytes .*models\[qlora\]"):
        lora.add_adapters(model, QLORA, 0)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("qlora")
    make_model_dir(path / "config")
    model = build_model(ModelConfig(path=path / "config", init="random"), dtype=torch.float32)
    export(model.hf, path / "model", path / "config", dtype=torch.float32)
    make_shards(path / "train", 30, seed=1)
    return path


def steps(folder: Path, out: Path) -> list[one_step.Step]:
    return one_step.on_a_rank(folder, out, RUNS)


def test_a_step_is_the_same_to_the_last_bit_wherever_the_four_bits_lie(tmp_path):
    pytest.importorskip("bitsandbytes")
    folder = tiny.write_model_dir(tmp_path / "model", tied=True)
    for found in run_ranks(steps, 2, folder, tmp_path / "runs"):
        for step in found[1:]:
            assert step.line["loss"] == found[0].line["loss"]
            for name, master in step.masters.items():
                assert torch.equal(master.tensor, found[0].masters[name].tensor), name


def test_a_run_is_resumed_and_loads_in_stock_peft_on_stock_four_bits(workspace):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    import peft

    run = workspace / "run"
    words = [
        *overrides(workspace, run, "run.steps=3", "checkpoint.every=2", "evaluation.shards=[]"),
        *("model.init=pretrained", "model.lora.rank=4", "model.lora.quantize=nf4"),
    ]
    run_ranks(run_stage, 2, [*words, "engine.zero.stage=3"])
    kept = load_file(run / "adapter/adapter_model.safetensors")
    shutil.rmtree(run / "checkpoints/step-000003")
    more = ["engine.zero.stage=1", "engine.gradient_accumulation_steps=2"]
    run_ranks(run_stage, 1, [*words, *more])
    for name, value in load_file(run / "adapter/adapter_model.safetensors").items():
        torch.testing.assert_close(value, kept[name], rtol=1e-3, atol=1e-4)
    assert metrics(run)[-1]["loss"] < metrics(run)[0]["loss"]

    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=["model.visual", "lm_head"],
    )
    base = Qwen3VLForConditionalGeneration.from_pretrained(
        workspace / "model", quantization_config=four_bits, device_map="cpu"
    )
    linears = [m for m in base.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(linears) == 7 * 3
    merged = Qwen3VLForConditionalGeneration.from_pretrained(run / "export")
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        base.train()  # in evaluation bitsandbytes computes in bf16 on some processors
        before = base(input_ids=ids).logits
        found = peft.PeftModel.from_pretrained(base, run / "adapter").train()(input_ids=ids).logits
        torch.testing.assert_close(merged(input_ids=ids).logits, found, rtol=1e-4, atol=1e-5)
    assert (found - before).abs().max() > 1e-2


def test_the_plan_and_the_count_know_four_bits(workspace):
    pytest.importorskip("bitsandbytes")

    def planned(*words: str) -> Any:
        config = load_config(
            sft_stage().SftConfig,
            None,
            [*overrides(workspace, workspace / "plan"), "model.lora.rank=2", *words],
        )
        config.model.compile = "none"
        return config

    plain, packed = planned(), planned("model.lora.quantize=nf4")
    assert _weight_bytes(packed) < 0.75 * _weight_bytes(plain)
    assert run_ranks(plans, 1, packed) == [True]
    model = build_model(ModelConfig(path=workspace / "model"), dtype=torch.float32)
    before = count_parameters(model)
    lora.add_adapters(model, LoraConfig(rank=2, quantize="nf4"), 0)
    added = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count_parameters(model)["language"] == before["language"] + added


def plans(config: Any) -> bool:
    """Not in the parent: what was traced there would keep ranks from a backward."""
    return bool(sft_stage().plan(config))


def _weight_bytes(config: Any) -> int:
    model = build_pretend_model(config.model, dtype=torch.float32)
    return sum(p.nbytes for p in model.parameters())
