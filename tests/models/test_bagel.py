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
    bagel_document,
    bagel_documents,
    pack_bagel,
    straight,
    write_bagel_model_dir,
)
from tests.models.test_text import shake
from triptych_models.bagel.layout import find_blocks, lay_out
from triptych_models.config import ModelConfig
from triptych_models.families import build_model, build_shell
from triptych_models.generate import generate
from triptych_models.sequence import SequenceGroup

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
    wanted = []
    for prompt in prompts:
        ids, kinds = prompt.input_ids, prompt.kinds
        for _ in range(3):
            token = straight(stock, model, prompt)[0][-1].argmax()
            prompt.input_ids = torch.cat([prompt.input_ids, token[None]])
            prompt.kinds = torch.cat([prompt.kinds, torch.zeros(1, dtype=torch.int64)])
        wanted.append(prompt.input_ids[len(ids) :].tolist())
        prompt.input_ids, prompt.kinds = ids, kinds
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


def test_what_is_not_computed_is_refused(build: Callable[..., Any], tmp_path: Path) -> None:
    model = build()
    with pytest.raises(ValueError, match=r"parallel\.sequence: must be 1 for a Bagel"):
        model.set_sequence(SequenceGroup(size=2))
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
