"""Adapters of mixtures: beside attention alone, gradients and merged weights as stock peft's."""

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F

from tests.models import tiny
from tests.models.proofs import PROOFS
from tests.models.stock import stock_twin
from tests.stages.test_lora import no_zeros
from triptych_models import lora
from triptych_models.config import LoraConfig, ModelConfig
from triptych_models.export import export
from triptych_models.families import build_model

ADAPTERS = LoraConfig(rank=3, alpha=4)


@pytest.mark.parametrize("family", ["dots1", "qwen2_moe", "qwen3_moe", "qwen3_vl_moe"])
def test_they_are_those_of_stock_peft(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where there are MLPs beside experts, which peft takes for those by their names."""
    monkeypatch.setattr(lora, "first_values", no_zeros)
    proof = PROOFS[family]
    folder = proof.write(tmp_path / "model")
    settings = {"init": "random", "moe": {"aux_loss": 0.0}, "lora": {"rank": 3}}
    config = ModelConfig(path=folder, seed=3, **settings)  # type: ignore[arg-type]
    config.check_path()
    model = build_model(config, dtype=torch.float32).train()
    stock, documents = stock_twin(model), proof.documents()
    batch = proof.pack(documents, 112)
    all_train = model.flops(batch)
    lora.add_adapters(model, ADAPTERS, 3)
    assert model.flops(batch) < all_train
    lora.export_adapter(model.hf, ADAPTERS, tmp_path / "adapter", folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # peft's, of names that it does not find
        theirs: Any = peft.PeftModel.from_pretrained(stock, tmp_path / "adapter", is_trainable=True)
    model(**batch).loss_sum.backward()
    for document in documents:
        logits = proof.logits(theirs, model, document)
        F.cross_entropy(logits, document.shift_labels, reduction="sum").backward()
    wanted = {
        "hf." + name.removeprefix("base_model.model."): p.grad
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == wanted.keys() and all("self_attn" in name for name in found)
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    export(model.hf, tmp_path / "merged", folder, dtype=torch.float32)
    again = build_model(ModelConfig(path=tmp_path / "merged"), dtype=torch.float32)
    merged = dict(theirs.merge_and_unload().named_parameters())
    shared = [name for name, _ in again.hf.named_parameters() if "self_attn" in name]
    assert len(shared) >= len(wanted) / 2
    for name in shared:
        torch.testing.assert_close(again.hf.get_parameter(name), merged[name])


def test_experts_and_what_moves_beside_gradients_are_left(tmp_path: Path) -> None:
    folder = tiny.write_dots1_model_dir(tmp_path / "model")
    model = build_model(ModelConfig(path=folder, init="random"), dtype=torch.float32)
    for target in ("experts", "router", "gate_proj"):
        with pytest.raises(ValueError, match=rf"must name parts .*\(language; .*got '{target}'"):
            lora.find_targets(model, LoraConfig(targets=[target]))
    settings = {"moe": {"aux_loss": 0.0, "bias_rate": 0.1}, "lora": {}}
    with pytest.raises(ValueError, match=r"bias_rate: must be 0 with model\.lora, got 0\.1"):
        ModelConfig(path=folder, **settings).check_path()  # type: ignore[arg-type]
