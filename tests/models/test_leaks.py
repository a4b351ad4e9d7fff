"""Documents of a row know nothing of each other, in any family, forward and backward, to 0.

Of a row of three documents only the second has targets: the gradients at the others' embeddings and
image features are exactly 0. And what the others say changes none of its hidden states by a bit.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models import tiny
from triptych_models.config import LoraConfig, ModelConfig
from triptych_models.families import build_model
from triptych_models.layout import decoder
from triptych_models.lora import add_adapters

SEQ_LEN = 96
CASES: dict[str, tuple[Callable[..., Path], dict[str, Any]]] = {
    "qwen3_vl": (tiny.write_model_dir, {}),
    "qwen3_vl, stock ops": (tiny.write_model_dir, {"fuse": False}),
    "qwen3_vl, adapters": (tiny.write_model_dir, {}),
    "qwen3": (tiny.write_text_model_dir, {}),
    "qwen3, diffusion": (tiny.write_text_model_dir, {"diffusion": {}}),
    "qwen2": (tiny.write_qwen2_model_dir, {}),
    "qwen3_moe": (tiny.write_moe_model_dir, {"moe": {"aux_over": "document"}}),
    "qwen2_moe": (tiny.write_qwen2_moe_model_dir, {"moe": {"aux_over": "document"}}),
    "dots1": (tiny.write_dots1_model_dir, {"moe": {"aux_over": "document"}}),
    "qwen3_5_text": (tiny.write_qwen3_5_model_dir, {}),
    "gated_delta_net": (tiny.write_gated_delta_net_dir, {}),
    "qwen3_next": (tiny.write_qwen3_next_model_dir, {"moe": {"aux_over": "document"}}),
    "mixtral": (tiny.write_mixtral_model_dir, {"moe": {"aux_over": "document"}}),
    "qwen3_vl_moe": (tiny.write_vl_moe_model_dir, {"moe": {"aux_over": "document"}}),
    "llava": (tiny.write_llava_model_dir, {}),
}


def documents(case: str) -> list[tiny.Document]:
    if case == "llava":
        return [tiny.llava_document(n, words=7, images=1) for n in (1, 2, 3)]
    grids = [(1, 4, 4)] if "vl" in case else []
    return [tiny.document(n, words=8, grids=grids) for n in (1, 2, 3)]


def packed(case: str, chosen: list[tiny.Document]) -> tuple[dict[str, Any], slice]:
    """The row, and where its second document is."""
    pack = tiny.pack_llava if case == "llava" else tiny.pack if "vl" in case else tiny.pack_text
    begin = len(chosen[0].input_ids)
    return pack(chosen, SEQ_LEN), slice(begin, begin + len(chosen[1].input_ids))


@pytest.fixture(params=CASES)
def case(request: Any, tmp_path: Path) -> tuple[str, Any]:
    write, settings = CASES[request.param]
    config = ModelConfig(path=write(tmp_path / "model", tied=True), init="random", **settings)
    model = build_model(config, dtype=torch.float32).train()
    if "adapters" in request.param:
        add_adapters(model, LoraConfig(rank=2, targets=["language", "vision"]), 0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
    return request.param, model


def test_no_gradient_reaches_another_document(case: tuple[str, Any]) -> None:
    name, model = case
    chosen = documents(name)
    for other in (chosen[0], chosen[2]):
        other.shift_labels[:] = -100
    batch, second = packed(name, chosen)
    seen: list[Tensor] = []

    def watch(module: Any, given: Any, embeddings: Tensor) -> Tensor:
        seen.append(embeddings.detach().requires_grad_())
        return seen[-1].clone()

    decoder(model.hf).embed_tokens.register_forward_hook(watch)
    features: list[Tensor] = []
    if "pixel_values" in batch:
        tower = model.hf.model
        merger = tower.visual.merger if hasattr(tower, "visual") else tower.multi_modal_projector
        merger.register_forward_hook(lambda *of: features.append(of[-1]))
    batch["num_targets"] = int((batch["shift_labels"] != -100).sum())
    loss = model(**batch).loss_sum
    gradient, *of_features = torch.autograd.grad(loss, [*seen, *features])
    gradient = gradient[0].clone()  # (T, H)
    assert gradient[second].norm() > 0
    gradient[second] = 0
    assert not gradient.any()
    assert len(of_features) == ("vl" in name or name == "llava")
    for of_images in of_features:
        first, mine, third = of_images.view(-1, of_images.shape[-1]).chunk(3)
        assert mine.norm() > 0 and not first.any() and not third.any()


def test_what_others_say_changes_no_bit(case: tuple[str, Any]) -> None:
    name, model = case
    model.eval()
    with torch.no_grad():
        batch, second = packed(name, documents(name))
        before = model.hidden_states(**tiny.inputs_only(batch))[0]
        chosen = documents(name)
        for other in (chosen[0], chosen[2]):
            other.input_ids[2] = (other.input_ids[2] + 1) % 280
            other.pixel_values = 255 - other.pixel_values
        after = model.hidden_states(**tiny.inputs_only(packed(name, chosen)[0]))[0]
    assert torch.equal(before[second], after[second])
    assert not torch.equal(before[: second.start], after[: second.start])
    assert not torch.equal(before[second.stop :], after[second.stop :])
