"""What a compiled layer keeps with selective checkpointing, and computes again."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from tests.models.test_families import tiny_config
from triptych_models.families import build_model
from triptych_models.pretend import pretend_batch

DEAR = {
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "triptych::attention",
    "triptych::gated_delta_rule",
    "triptych::moe_mlp",
}


def step(model: Any, batch: dict[str, Any]) -> tuple[Counter[str], int, list[Tensor]]:
    """How often what was called, how many bytes waited for the backward, the gradients."""
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    model.zero_grad()
    with saved_tensors_hooks(keep, lambda x: x):
        loss = model(**batch).loss_sum
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.profiler.profile() as profile:
        loss.backward()
    called = Counter(event.name for event in profile.events() if event.name in DEAR)
    bytes_kept = sum(size for place, size in kept.items() if place not in weights)
    return called, bytes_kept, [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "qwen3_5_text", "qwen2_5_vl"])
def test_products_and_attention_are_kept_and_the_rest_is_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    model = build_model(tiny_config(family, tmp_path), dtype=torch.float32).train()
    model.compile_layers()
    batch = pretend_batch(
        model, 64, document_len=32, target_share=1.0, image_share=0.5, image_tokens=4
    )
    found = {}
    for way in ("none", "selective"):
        model.set_checkpointing(way)
        step(model, batch)  # compiles
        found[way] = step(model, batch)
        with torch.no_grad():
            model.eval()(**batch)
        model.train()
    (called, kept, gradients), (called_less, kept_less, same) = found.values()
    assert called_less == called  # in the backward, so nothing dear a second time
    assert kept_less < 0.8 * kept
    torch.testing.assert_close(same, gradients)
    torch._dynamo.reset()
