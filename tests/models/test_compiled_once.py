"""Layers of one kind are one graph to the compiler, the first among them too."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.models.test_families import tiny_config
from triptych_models.families import build_model
from triptych_models.pretend import pretend_batch


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "internvl", "aero", "bagel"])
def test_a_layer_of_each_kind_is_compiled_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """The first layer of a tower is given what patches or frames were cut into."""
    graphs = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=graphs))
    torch._dynamo.reset()
    model = build_model(tiny_config(family, tmp_path), dtype=torch.float32).train()
    model.compile_layers()
    shape = {"image_share": 0.5, "image_tokens": 4, "audio_share": 0.25, "audio_seconds": 0.16}
    batch = pretend_batch(model, 64, document_len=32, target_share=1.0, **shape)
    model(**batch).loss_sum.backward()
    layers = [g for g in graphs.graphs if any(n.op == "placeholder" for n in g.graph.nodes)]
    assert len(layers) == 2  # the tower's and the language model's
    torch._dynamo.reset()
