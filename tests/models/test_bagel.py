"""A Bagel beside what test_families.py proves: layouts found late, answers, drawings, refusals."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import tiny
from tests.models.stock import stock_twin
from tests.models.straight_bagel import (
    CONFIG,
    SIDE,
    WORDS_BEGIN,
    WORDS_END,
    bagel_document,
    bagel_documents,
    pack_bagel,
    straight,
    straight_loss,
    write_bagel_model_dir,
)
from tests.models.test_text import shake
from triptych_models.bagel.drawing import draw
from triptych_models.bagel.join import patches_of
from triptych_models.bagel.layout import find_blocks, lay_out
from triptych_models.config import LoraConfig, ModelConfig
from triptych_models.export import export, stored_tensors
from triptych_models.families import build_model, build_shell
from triptych_models.generate import generate
from triptych_models.lora import add_adapters
from triptych_models.sequence import SequenceGroup
from triptych_models.tensor import tensor_cuts
from triptych_models.weights import whole

SEQ_LEN = 112


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Any]:
    def build_tiny(**fields: Any) -> Any:
        write_bagel_model_dir(tmp_path / "tiny", **fields)
        config = ModelConfig(path=tmp_path / "tiny", init="random", seed=3)
        model = build_model(config, dtype=torch.float32).train()
        shake(model)
        return model

    return build_tiny


def test_a_row_that_nobody_laid_out_is_the_same(build: Callable[..., Any]) -> None:
    model = build()
    batch = pack_bagel(bagel_documents(), SEQ_LEN)
    added = model.lay_out(**{k: v for k, v in batch.items() if k in INPUTS})
    plain = {k: v for k, v in batch.items() if k not in added or k == "position_ids"}
    assert "token_order" not in plain
    assert torch.equal(model(**batch).loss_sum, model(**plain).loss_sum)


INPUTS = (
    "input_ids",
    "cu_seqlens",
    "image_positions",
    "image_grid_thw",
    "latent_positions",
    "latent_grids",
    "latent_times",
)


def test_blocks_are_images_with_the_tokens_around_them() -> None:
    """Where these are there, and of the same document."""
    docs = [bagel_document(0, 2, (1, 2)), bagel_document(1, (2, 2, 0.5), 3)]
    batch = pack_bagel(docs, 20)
    assert [tuple(block) for block in find_blocks(batch, CONFIG)] == [
        (2, 6, False),
        (6, 12, True),
    ]
    bare = {**batch, "input_ids": torch.zeros_like(batch["input_ids"])}
    assert [tuple(block) for block in find_blocks(bare, CONFIG)] == [(3, 5, False), (7, 11, True)]


def test_answers_are_the_straight_models(build: Callable[..., Any]) -> None:
    model = build()
    stock = stock_twin(model)
    prompts = [bagel_document(5, 3), bagel_document(6, 2, (2, 3), 2), bagel_document(7, 4)]
    wanted = [straight_answer(stock, model, prompt) for prompt in prompts]
    for synced in (False, True):
        found = generate(
            model,
            prompts,
            max_new_tokens=3,
            eos_token_id=tiny.EOS,
            pad_token_id=tiny.PAD,
            synced=synced,
        )
        assert found == wanted
    settings = {"max_new_tokens": 2, "eos_token_id": tiny.EOS, "pad_token_id": tiny.PAD}
    assert generate(model, [], **settings) == []
    assert generate(model, [], **settings, synced=True) == []
    assert model.training


def test_an_answer_may_say_the_token_of_images(build: Callable[..., Any]) -> None:
    """Which is no image there."""
    model, prompt = build(), bagel_document(6, 2, (2, 3), 2)
    (first, *_), head = straight_answer(stock_twin(model), model, prompt), model.hf.lm_head.weight
    with torch.no_grad():
        head[[first, tiny.IMAGE]] = head[[tiny.IMAGE, first]]
    wanted = straight_answer(stock_twin(model), model, prompt)
    assert wanted[0] == tiny.IMAGE
    settings = {"max_new_tokens": 3, "eos_token_id": tiny.EOS, "pad_token_id": tiny.PAD}
    assert generate(model, [prompt], **settings) == [wanted]


def straight_answer(stock: Any, model: Any, prompt: Any) -> list[int]:
    """The three tokens that come next."""
    ids, kinds = prompt.input_ids, prompt.kinds
    for _ in range(3):
        token = straight(stock, model, prompt)[0][-1].argmax()
        prompt.input_ids = torch.cat([prompt.input_ids, token[None]])
        prompt.kinds = torch.cat([prompt.kinds, torch.zeros(1, dtype=torch.int64)])
    found: list[int] = prompt.input_ids[len(ids) :].tolist()
    prompt.input_ids, prompt.kinds = ids, kinds
    return found


def test_what_is_not_computed_is_refused(build: Callable[..., Any], tmp_path: Path) -> None:
    model = build()
    with pytest.raises(ValueError, match=r"parallel\.sequence: must be 1 for a Bagel"):
        model.set_sequence(SequenceGroup(size=2))
    model.hf.config.llm_config.num_key_value_heads = 2
    with pytest.raises(ValueError, match=r"parallel\.tensor: must be 1 for layers .* MixedLayer"):
        tensor_cuts(model, 2)
    batch = pack_bagel([bagel_document(0, 2, (1, SIDE))], 16)
    wide = {k: v for k, v in batch.items() if k in INPUTS}
    wide["image_grid_thw"] = torch.tensor([[1, 1, SIDE + 1]])
    wide["image_positions"] = torch.arange(SIDE + 1)
    with pytest.raises(ValueError, match=f"at most {SIDE} patches a side"):
        lay_out(wide, CONFIG)
    for key, value, message in (
        ("llm_config", {"layer_module": "Qwen2DecoderLayer"}, "llm_config.layer_module must be"),
        ("llm_config", {"qk_norm": False}, "llm_config.qk_norm must be True"),
        ("vit_config", {"rope": True}, "vit_config.rope must be False"),
        ("vit_config", {"image_size": 8}, "vit_max_num_patch_per_side must be 2"),
    ):
        config = json.loads((tmp_path / "tiny/config.json").read_text())
        config[key] |= value
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other/config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            build_shell(ModelConfig(path=tmp_path / "other"), dtype=torch.float32)


SPARSE = {"block_size": 2, "num_selected": 4, "window": 4}


def test_sparse_attention_is_the_straight_one(build: Callable[..., Any]) -> None:
    """Heads and tokens in their places, gates of their branches, images seen both ways."""
    model = build(sparse_attention=SPARSE)
    stock, documents = stock_twin(model), bagel_documents()
    ours = model(**pack_bagel(documents, SEQ_LEN)).loss_sum
    ours.backward()
    theirs = torch.stack([straight_loss(stock, model, doc) for doc in documents]).sum()
    theirs.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    for (name, p), q in zip(model.hf.named_parameters(), stock.parameters(), strict=True):
        if p.requires_grad:
            assert (p.grad - q.grad).norm() <= 1e-4 * q.grad.norm() + 1e-5, name
    assert model.hf.model.language_model.layers[0].self_attn.g_proj.weight.grad.norm() > 1e-3
    # An image's first patch sees its last, as in no causal attention.
    doc = bagel_document(1, 3, (2, 3), 4)
    batch = pack_bagel([doc], 16)
    before = model.hidden_states(**inputs_of(batch))
    batch["pixel_values"][-1] += 50
    after = model.hidden_states(**inputs_of(batch))
    first = int(batch["image_positions"][0])
    assert not torch.allclose(before[0, first], after[0, first], atol=1e-3)
    assert torch.equal(before[0, :3], after[0, :3])


def inputs_of(batch: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in batch.items() if k not in ("shift_labels", "num_targets")}


def test_wide_settings_of_sparse_attention_are_dense(build: Callable[..., Any]) -> None:
    """A window over all, and its gate alone open: the pairs of dense attention."""
    model = build(sparse_attention={"block_size": 4, "num_selected": 3, "window": 200})
    batch = pack_bagel(bagel_documents(), SEQ_LEN)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "g_proj" in name:
                shut = torch.tensor([-200.0, -200.0, 200.0]).repeat(len(p) // 3)
                p.copy_(shut if p.dim() == 1 else torch.zeros_like(p))
        sparse = model(**batch).loss_sum
        for layer in model.hf.model.language_model.layers:
            layer.self_attn.sparse = None
        torch.testing.assert_close(sparse, model(**batch).loss_sum, rtol=1e-5, atol=0)


def test_a_dense_folder_begins_sparse(build: Callable[..., Any], tmp_path: Path) -> None:
    """Whose gates begin as at random, and are stored from then on."""
    dense = build()
    export(dense.hf, tmp_path / "dense", tmp_path / "tiny", dtype=torch.float32)
    config = json.loads((tmp_path / "dense/config.json").read_text())
    config["sparse_attention"] = SPARSE
    (tmp_path / "dense/config.json").write_text(json.dumps(config))
    sparse = build_model(ModelConfig(path=tmp_path / "dense"), dtype=torch.float32)
    weights = dict(sparse.named_parameters())
    assert all(not p.any() for name, p in weights.items() if "g_proj" in name)
    assert all(torch.equal(p, weights[name]) for name, p in dense.named_parameters())
    assert "g_proj" in " ".join(name for name, _ in stored_tensors(sparse.hf, whole))
    (tmp_path / "dense/config.json").write_text(json.dumps(config | {"sparse_attention": {}}))
    with pytest.raises(ValueError, match="sparse_attention must say block_size, num_selected"):
        build_shell(ModelConfig(path=tmp_path / "dense"), dtype=torch.float32)


def test_drawings_are_eulers_steps_of_the_straight_model(build: Callable[..., Any]) -> None:
    """Guided, shifted, several prompts in a row; and without guidance by half the row."""
    model = build()
    stock = stock_twin(model)
    words, noise = [[5, 6, 7], [8]], torch.randn(2, 4, 4, 6)
    model.eval()
    for guidance, shift in ((2.5, 3.0), (1.0, 1.0)):
        found = draw(model, words, noise, steps=2, guidance=guidance, shift=shift)
        for drawn, ids, start in zip(found, words, noise, strict=True):
            x = patches_of(start[None], model.hf.config)[0]
            for time, following in ((1.0, shift / (1 + shift)), (shift / (1 + shift), 0.0)):
                told, free = (
                    straight(stock, model, drawn_document(said, x, time))[1] for said in (ids, [])
                )
                x = x + (following - time) * (free + guidance * (told - free))
            wanted = patches_of(drawn[None], model.hf.config)[0]
            torch.testing.assert_close(wanted, x, rtol=1e-4, atol=1e-5)
    assert not model.training
    # With no words at all a row has no text to be causal.
    alone = draw(model, [[]], noise[:1], steps=1, guidance=1.0, shift=1.0)
    x = patches_of(noise[:1], model.hf.config)[0]
    x = x - straight(stock, model, drawn_document([], x, 1.0))[1]
    torch.testing.assert_close(patches_of(alone, model.hf.config)[0], x, rtol=1e-4, atol=1e-5)


def drawn_document(words: list[int], x: torch.Tensor, time: float) -> Any:
    """A document of words and latents x (2 x 3 patches) at a time, as `draw` asks for it."""
    doc = bagel_document(0, (2, 3, time))
    ids = torch.tensor([WORDS_BEGIN, *words, WORDS_END] if words else [], dtype=torch.int64)
    doc.input_ids = torch.cat([ids, doc.input_ids])
    doc.kinds = torch.cat([torch.zeros_like(ids), doc.kinds])
    doc.latents = doc.latent_noise = x
    return doc


@pytest.mark.parametrize("way", ["full", "selective", "offload"])
def test_recomputed_layers_give_the_same_gradients(build: Callable[..., Any], way: str) -> None:
    batch = pack_bagel(bagel_documents(), SEQ_LEN)
    found = []
    for checkpointing in ("none", way):
        model = build()
        model.set_checkpointing(checkpointing)
        model(**batch).loss_sum.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again, rtol=1e-5, atol=1e-6)


def test_adapters_stand_beside_either_experts(build: Callable[..., Any]) -> None:
    """The loss is the base's at first, and both of their FLOPs count a token once."""
    batch, model = pack_bagel(bagel_documents(), SEQ_LEN), build()
    base, frozen = model(**batch).loss_sum, model.flops(batch) / 3
    add_adapters(model, LoraConfig(rank=2, targets=["language", "generation"]), 0)
    adapted = model(**batch).loss_sum
    torch.testing.assert_close(adapted, base)
    adapted.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert any("q_proj_moe_gen" in name for name in trained)
    assert all("lora_" in name and p.grad is not None for name, p in trained.items())
    assert frozen < model.flops(batch) < 3 * frozen
