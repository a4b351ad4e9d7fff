"""A LLaVA of SigLIP and Qwen3: packed rows give what stock gives for documents one by one."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, LlavaForConditionalGeneration

from tests.models import tiny
from triptych_models.config import LoraConfig, ModelConfig
from triptych_models.export import export
from triptych_models.families import build_model
from triptych_models.freeze import count_parameters
from triptych_models.generate import generate, model_inputs
from triptych_models.llava import Llava
from triptych_models.lora import add_adapters
from triptych_models.packed import PackedModel

SEQ_LEN = 96
IDLE = ("encoder.layers.2.", "post_layernorm")  # behind the features


def build(folder: Path, dtype: torch.dtype = torch.float32, **fields: Any) -> PackedModel:
    settings = {"path": folder, "init": "random", "seed": 3, **fields}
    return build_model(ModelConfig(**settings), dtype=dtype).train()


@pytest.fixture(params=["gelu", "linear"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tiny.write_llava_model_dir(
        tmp_path / "llava", tied=True, projector_hidden_act=request.param
    )


def documents() -> list[tiny.Document]:
    counts = [(9, 0), (1, 1), (8, 2), (5, 0)]
    return [tiny.llava_document(i, words=w, images=n) for i, (w, n) in enumerate(counts)]


def stock_twin(model: PackedModel) -> LlavaForConditionalGeneration:
    config = AutoConfig.for_model(**model.hf.config.to_dict())
    stock = LlavaForConditionalGeneration._from_config(config, dtype=next(model.parameters()).dtype)
    stock.load_state_dict(model.hf.state_dict(), strict=True)
    return stock


def images_of(model: Llava, doc: tiny.Document) -> Tensor:
    """Pixels as stock takes them, put together patch by patch."""
    side, patch = tiny.LLAVA_SIDE // tiny.LLAVA_PATCH, tiny.LLAVA_PATCH
    dtype = next(model.parameters()).dtype
    images = torch.zeros(len(doc.image_grid_thw), 3, side * patch, side * patch, dtype=dtype)
    for number, pixels in enumerate(doc.pixel_values):
        image, place = divmod(number, side * side)
        row, column = divmod(place, side)
        rows = slice(row * patch, (row + 1) * patch)
        columns = slice(column * patch, (column + 1) * patch)
        images[image, :, rows, columns] = pixels.view(3, patch, patch).to(dtype)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (model.image_mean, model.image_std))
    return (images / 255 - mean) / std


def stock_loss(
    stock: LlavaForConditionalGeneration, model: Any, chosen: list[tiny.Document]
) -> Tensor:
    losses = []
    for doc in chosen:
        inputs = {"input_ids": doc.input_ids[None]}
        if len(doc.image_grid_thw):
            inputs["pixel_values"] = images_of(model, doc)
        logits = stock(**inputs).logits[0]
        losses.append(F.cross_entropy(logits, doc.shift_labels, reduction="sum"))
    return torch.stack(losses).sum()


@pytest.mark.parametrize("chosen", [slice(0, 4), slice(0, 1)], ids=["images", "text"])
def test_loss_and_gradients_are_those_of_stock(folder: Path, chosen: slice) -> None:
    model = build(folder, torch.float64)
    stock = stock_twin(model)
    ours = model(**tiny.pack_llava(documents()[chosen], SEQ_LEN)).loss_sum
    theirs = stock_loss(stock, model, documents()[chosen])
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=0)
    ours.backward()
    theirs.backward()
    wanted = dict(stock.named_parameters())
    largest = max(float(p.grad.norm()) for p in wanted.values() if p.grad is not None)
    for name, parameter in model.hf.named_parameters():
        if any(idle in name for idle in IDLE):
            assert parameter.grad is None and not parameter.requires_grad, name
            continue
        gradient = wanted[name].grad
        if gradient is None:  # the tower of stock does not run without images
            assert chosen.stop == 1 and not parameter.grad.any(), name
            continue
        error = (parameter.grad - gradient).norm() / max(float(gradient.norm()), 1e-4 * largest)
        assert error < 1e-5, f"{name} off by {error:.1e}"


def test_checkpointing_and_frozen_parts_change_nothing_else(folder: Path) -> None:
    batch = tiny.pack_llava(documents(), SEQ_LEN)
    plain = build(folder)
    plain(**batch).loss_sum.backward()
    wanted = {name: p.grad for name, p in plain.named_parameters()}
    for frozen, kept in (([], "full"), (["vision", "language"], "none"), (["vision"], "selective")):
        model = build(folder, freeze=frozen)
        model.set_checkpointing(kept)
        model(**batch).loss_sum.backward()
        assert model.trainable_parts() == {"vision", "projector", "language"} - {*frozen}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-5)
            else:
                assert parameter.grad is None, name


@pytest.mark.parametrize(
    ("frozen", "language", "vision"),
    [([], 3, 3), (["vision"], 3, 1), (["vision", "language"], 3, 1), (["projector"], 3, 3)],
    ids=str,
)
def test_flops_are_those_that_torch_counts(
    folder: Path, frozen: list[Any], language: int, vision: int
) -> None:
    """All but attention, which is by formula: torch takes the causal one for full."""
    model = build(folder, freeze=frozen)
    batch = tiny.pack_llava(documents(), SEQ_LEN) | {"num_targets": SEQ_LEN}  # logits of all rows
    with FlopCounterMode(display=False) as counter:
        model.logits(**tiny.inputs_only(batch)).sum().backward()
    everything = counter.get_flop_counts()["Global"].items()
    expected = sum(n for op, n in everything if "scaled_dot_product" not in str(op))
    lengths = batch["cu_seqlens"].diff().tolist()
    pairs, squares = sum(n * (n + 1) / 2 for n in lengths), 3 * 9 * 9
    expected += 4.0 * (language * 2 * 64 * pairs + vision * 2 * 32 * squares)  # layers, widths
    assert model.flops(batch) == expected


def test_an_export_is_what_stock_loads_and_we_read(folder: Path, tmp_path: Path) -> None:
    model = build(folder)
    export(model.hf, tmp_path / "export", folder, dtype=torch.float32)
    stock, info = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "export", output_loading_info=True
    )
    assert not any(info.values()), info
    again = build(tmp_path / "export", init="pretrained")
    for (name, ours), theirs in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
        assert torch.equal(ours, stock.state_dict()[name.removeprefix("hf.")]), name
    counts = count_parameters(model)
    assert sum(counts.values()) == sum(p.numel() for p in stock.parameters())
    assert counts["projector"] == 2 * (32 * 32 + 32)


def test_answers_are_those_of_a_packed_forward(folder: Path) -> None:
    model = build(folder).eval()
    prompts = documents()
    settings = {"max_new_tokens": 3, "eos_token_id": tiny.EOS, "pad_token_id": tiny.PAD}
    found = generate(model, prompts, **settings)
    for prompt, answer in zip(prompts, found, strict=True):
        longer = tiny.llava_document(0)
        longer.pixel_values, longer.image_grid_thw = prompt.pixel_values, prompt.image_grid_thw
        ids = prompt.input_ids
        for token in answer:
            longer.input_ids, longer.shift_labels = ids, torch.full_like(ids, -100)
            longer.position_ids = torch.arange(len(ids)).expand(3, -1)
            batch = tiny.inputs_only(tiny.pack_llava([longer], len(ids)))
            assert int(model.logits(**batch)[0, -1].argmax()) == token
            ids = torch.cat((ids, torch.tensor([token])))
    # Of text alone, as ZeRO-3 has it: the tower runs, and no answer changes.
    texts = [prompts[0], prompts[3]]
    plain, forced = (
        model.hf(**model_inputs(model, texts, tiny.PAD, force_image=force)).logits[:, -1]
        for force in (False, True)
    )
    torch.testing.assert_close(forced, plain, rtol=1e-5, atol=1e-5)
    assert "pixel_values" in model_inputs(model, [], tiny.PAD, force_image=True)


def test_adapters_find_tower_projector_and_language(folder: Path) -> None:
    model = build(folder)
    batch = tiny.pack_llava(documents(), SEQ_LEN)
    before = model(**batch).loss_sum
    config = LoraConfig(rank=2, targets=["vision", "projector", "language"])
    add_adapters(model, config, 0)
    torch.testing.assert_close(model(**batch).loss_sum, before)
    assert model.flops(batch) > 0 and model.trainable_parts() == {
        "vision",
        "projector",
        "language",
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vision_feature_layer": -4}, r"vision_feature_layer must be the number of a block"),
        ({"vision_feature_layer": [1, 2]}, r"must be the number of a block"),
        ({"vision_feature_select_strategy": "default"}, r"select_strategy must be full"),
        ({"vision_config": {"model_type": "clip_vision_model"}}, r"must be siglip_vision_model"),
    ],
)
def test_other_llavas_are_refused(tmp_path: Path, fields: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(tiny.write_llava_model_dir(tmp_path / "other", **fields))
