"""A SigLIP's tower, each projector and each kind of text model become a folder that trains."""

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401  once, and not on every rank
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tests.ranks import run_ranks
from tests.stages.test_sft import metrics, overrides, run_stage
from tests.tiny import ROOT, make_shards
from triptych_data.batch import collate
from triptych_data.processor import Processor
from triptych_data.shards.reader import Shards
from triptych_models.config import ModelConfig
from triptych_models.families import build_model

sys.path.insert(0, str(ROOT / "tools"))
from assemble_vlm import assemble, main

TEXT = ROOT / "stages/configs/qwen3_tiny"
SIDE = 24
QUERIES = {"resampler": 9}
TOKENS = {"linear": 16, "mlp": 16, "pixel_unshuffle": 4, "resampler": 9}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 6,
}


def write_siglip(path: Path, *, whole: bool) -> Path:
    """A SigLIP as published, or its tower alone; SigLIP 2 of one size is the former."""
    vision = SiglipVisionConfig(**TOWER)
    text = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "vocab_size": 64}
    model: Any = (
        SiglipModel(SiglipConfig(vision_config=vision.to_dict(), text_config=text))
        if whole
        else SiglipVisionModel(vision)
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(path)
    rules = {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": SIDE, "width": SIDE},
        "resample": 2 if whole else 3,
        "do_convert_rgb": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (path / "preprocessor_config.json").write_text(json.dumps(rules))
    return path


def write_language(path: Path, kind: str) -> Path:
    """A text model, 40 wide, that knows no token for images."""
    rope = {"rope_type": "default", "rope_theta": 5000.0}
    config = AutoConfig.for_model(
        kind,
        vocab_size=412,
        hidden_size=40,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters=rope,
        tie_word_embeddings=kind == "qwen3",
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer = json.loads((TEXT / "tokenizer.json").read_text())
    kept = [t for t in tokenizer["added_tokens"] if not t["content"].startswith("<|vi")]
    kept = [t for t in kept if t["content"] != "<|image_pad|>"]
    (path / "tokenizer.json").write_text(json.dumps(tokenizer | {"added_tokens": kept}))
    settings = (TEXT / "tokenizer_config.json").read_text()
    (path / "tokenizer_config.json").write_text(settings)
    return path


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parts")
    for whole in (True, False):
        write_siglip(path / f"siglip-{whole}", whole=whole)
    for kind in ("qwen3", "qwen2", "llama"):
        write_language(path / kind, kind)
    return path


@pytest.mark.parametrize(
    ("projector", "language", "whole"),
    [
        ("mlp", "qwen3", True),
        ("linear", "llama", False),
        ("pixel_unshuffle", "qwen2", True),
        ("resampler", "qwen3", False),
    ],
)
def test_all_of_it_is_computed_as_transformers_does_from_files_to_logits(
    parts: Path, tmp_path: Path, projector: str, language: str, whole: bool
) -> None:
    out = tmp_path / "vlm"
    words = ["--vision", parts / f"siglip-{whole}", "--language", parts / language]
    words += ["--projector", projector, "--output", out]
    words += [f"--queries={QUERIES[projector]}"] if projector in QUERIES else []
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    stock, info = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info

    # On text alone, the language model as it was.
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        before = AutoModelForCausalLM.from_pretrained(parts / language)(ids).logits
        after = stock(input_ids=ids).logits[..., : before.shape[-1]]
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)

    # A chat with an image: tokens, pixels and logits of stock processor and model.
    Image.effect_noise((50, 37), 80).convert("RGB").save(tmp_path / "noise.png")
    image = {"type": "image", "image": "noise.png"}
    chat = [
        {"role": "user", "content": [image, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "Noise."},
    ]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": chat}))
    from triptych_data.shards.write import write_shards

    write_shards(tmp_path / "chats.jsonl", tmp_path / "shards")
    ours = Processor.from_directory(out)
    sample = ours.encode(Shards.open([tmp_path / "shards"]).read(0))
    theirs = AutoProcessor.from_pretrained(out)
    text = theirs.apply_chat_template(
        [chat[0], {"role": "assistant", "content": [{"type": "text", "text": "Noise."}]}]
    )
    inputs = theirs(images=Image.open(tmp_path / "noise.png"), text=text, return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == sample.input_ids.tolist()
    assert sample.input_ids.tolist().count(ours.image_token_id) == TOKENS[projector]
    model: Any = build_model(ModelConfig(path=out), dtype=torch.float32)
    model.check_processor(ours)
    pixels = model.whole_images(sample.pixel_values.float() / 127.5 - 1)
    torch.testing.assert_close(pixels, inputs["pixel_values"], rtol=0, atol=1e-6)
    batch = collate([sample], 64, pad_token_id=ours.pad_token_id, position_axes=ours.position_axes)
    for key in ("shift_labels", "num_targets", "num_tokens", "sample_keys"):
        batch.pop(key, None)
    with torch.no_grad():
        wanted = stock(**inputs).logits
        found = model.logits(**batch)[:, : len(sample.input_ids)]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def train(workspace: Path, out: Path, stage: int, freeze: str) -> None:
    rows = 1 if stage == 3 else 2  # a rank, of two a step
    words = ["run.steps=2", "model.init=pretrained", "evaluation.shards=[]", "data.ledger=false"]
    words += [f"engine.zero.stage={stage}", f"engine.gradient_accumulation_steps={rows}"]
    words += [f"model.path={workspace / 'vlm'}", f"model.freeze={freeze}", "checkpoint.every=100"]
    run_stage(overrides(workspace, out, *words))


@pytest.mark.parametrize(
    ("projector", "freeze"), [("mlp", "[]"), ("resampler", "[vision,language]")]
)
def test_two_ranks_under_zero_3_train_it_as_one_does(
    parts: Path, tmp_path: Path, projector: str, freeze: str
) -> None:
    assemble(
        parts / "siglip-True",
        parts / "qwen3",
        tmp_path / "vlm",
        projector,
        queries=QUERIES.get(projector),
    )
    make_shards(tmp_path / "train", 30, seed=1)
    run_ranks(train, 1, tmp_path, tmp_path / "one", 0, freeze)
    run_ranks(train, 2, tmp_path, tmp_path / "two", 3, freeze)
    one, two = (metrics(tmp_path / ranks) for ranks in ("one", "two"))
    for key in ("loss", "grad_norm"):
        found, wanted = ([line[key] for line in lines] for lines in (two, one))
        assert found == pytest.approx(wanted, rel=1e-4), key
    exports = [tmp_path / ranks / "export" for ranks in ("one", "two")]
    states = [AutoModelForImageTextToText.from_pretrained(e).state_dict() for e in exports]
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-3, atol=1e-5)


def test_what_does_not_fit_is_refused(parts: Path, tmp_path: Path) -> None:
    def said(vision: str, language: str, *words: str) -> str:
        options = ["--vision", str(parts / vision), "--language", str(parts / language)]
        return CliRunner().invoke(main, [*options, "--output", str(tmp_path / "o"), *words]).output

    siglip = ("siglip-True", "qwen3")
    assert "--vision: must be a folder of a qwen3_vl or siglip" in said("qwen3", "qwen3")
    assert "--language: must be a folder of a qwen3 or qwen2" in said("siglip-True", "siglip-True")
    assert "must divide the 4 patches" in said(*siglip, "--factor", "3")
    queries = said(*siglip, "--projector", "resampler", "--queries", "5")
    assert "num_queries must be a square, got 5" in queries
    unused = said(*siglip, "--projector", "mlp", "--queries", "9")
    assert "--queries: must be left out but for resampler" in unused
    unused = said(*siglip, "--projector", "resampler", "--factor", "2")
    assert "--factor: must be left out but for pixel_unshuffle" in unused
    assert not (tmp_path / "o").exists()
