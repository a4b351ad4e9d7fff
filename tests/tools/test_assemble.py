"""A tower and a language model become a stock Qwen3-VL with a fresh projector."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoProcessor, Qwen3ForCausalLM, Qwen3VLForConditionalGeneration

from tests.tiny import ROOT, make_model_dir, make_shards
from triptych_data.batch import collate
from triptych_data.processor import Processor
from triptych_data.shards.reader import Shards
from triptych_models.config import ModelConfig
from triptych_models.export import export
from triptych_models.families import build_model

sys.path.insert(0, str(ROOT / "tools"))
from assemble_vlm import assemble, main

TEXT = ROOT / "stages/configs/qwen3_tiny"
PATCHES = {"pixel_unshuffle": 4, "mlp": 1}  # a token
MEDIA = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-VL whose language model is 48 wide."""
    return weighted(make_model_dir(tmp_path_factory.mktemp("vision") / "small"), torch.float32)


@pytest.fixture(params=["tied", "untied"])
def language(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A Qwen3, 40 wide, whose tokenizer has no token for media: they come behind its table."""
    folder = tmp_path / "text"
    folder.mkdir()
    config = json.loads((TEXT / "config.json").read_text())
    config |= {"hidden_size": 40, "intermediate_size": 64, "head_dim": 32, "vocab_size": 412}
    config |= {"tie_word_embeddings": request.param == "tied"}
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 5000.0}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((TEXT / "tokenizer.json").read_text())
    kept = [token for token in tokenizer["added_tokens"] if token["content"] not in MEDIA]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | {"added_tokens": kept}))
    settings = json.loads((TEXT / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{{ 'not for images' }}"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return weighted(folder, torch.float32)


def weighted(folder: Path, dtype: torch.dtype) -> Path:
    model = build_model(ModelConfig(path=folder, init="random"), dtype=dtype)
    out = folder.with_name(folder.name + "-weights")
    export(model.hf, out, folder, dtype=dtype, max_shard_bytes=100_000)
    return out


def load(folder: Path) -> Any:
    model, info = Qwen3VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("projector", PATCHES)
def test_stock_transformers_loads_what_it_is_put_together_of(
    vision: Path, language: Path, tmp_path: Path, projector: Any
) -> None:
    out = tmp_path / "vlm"
    assemble(vision, language, out, projector, max_shard_bytes=200_000)
    stock = load(out)
    made, tower, text = tensors(out), tensors(vision), tensors(language)
    for name, value in made.items():
        if "merger" in name:
            if value.ndim == 2:
                assert 0.01 < float(value.std()) < 0.03
                assert value.shape != tower[name].shape or not torch.equal(value, tower[name])
        elif name.startswith("model.visual."):
            assert torch.equal(value, tower[name]), name
        else:
            stored = text[name.replace("language_model.", "")]
            assert torch.equal(value[: len(stored)], stored), name
            for row in value[len(stored) :]:
                torch.testing.assert_close(row, stored.mean(0))
    assert stock.config.vision_config.spatial_merge_size**2 == PATCHES[projector]

    # On text alone, the language model as it was.
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        before = Qwen3ForCausalLM.from_pretrained(language)(ids).logits
        after = stock(input_ids=ids).logits[..., : before.shape[-1]]
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("projector", PATCHES)
def test_our_family_computes_it_with_images_as_stock_does(
    vision: Path, language: Path, tmp_path: Path, projector: Any
) -> None:
    out = tmp_path / "vlm"
    assemble(vision, language, out, projector)
    processor = Processor.from_directory(out)
    model = build_model(ModelConfig(path=out), dtype=torch.float32)
    model.check_processor(processor)
    shards = Shards.open([make_shards(tmp_path / "data", 3)])
    sample = processor.encode(shards.read(2))  # two images
    assert len(sample.image_grid_thw) == 2
    tokens = int((sample.input_ids == processor.image_token_id).sum())
    assert tokens == len(sample.pixel_values) // PATCHES[projector]
    batch = collate(
        [sample], 1024, pad_token_id=processor.pad_token_id, position_axes=processor.position_axes
    )
    for key in ("shift_labels", "num_targets", "num_tokens", "sample_keys"):
        batch.pop(key, None)
    inputs: dict[str, Any] = {"input_ids": sample.input_ids[None]}
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == processor.image_token_id).int()
    pixels = sample.pixel_values.float() / 127.5 - 1
    with torch.no_grad():
        wanted = load(out)(**inputs, pixel_values=pixels, image_grid_thw=sample.image_grid_thw)
        found = model.logits(**batch)[:, : len(sample.input_ids)]
    torch.testing.assert_close(found, wanted.logits, rtol=1e-4, atol=1e-5)

    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    stock_processor = AutoProcessor.from_pretrained(out)
    text = stock_processor.apply_chat_template(chat)
    assert text.count("<|image_pad|>") == 1
    ids = stock_processor.tokenizer(text)["input_ids"]
    assert ids.count(stock_processor.image_token_id) == 1
    assert processor.image_token_id == stock_processor.image_token_id == 413


def test_what_does_not_fit_is_refused(vision: Path, tmp_path: Path) -> None:
    def said(*words: Any) -> str:
        return CliRunner().invoke(main, [*map(str, words), "--output", str(tmp_path / "o")]).output

    same = said("--vision", vision, "--language", vision)
    assert "--language: must be a folder of a qwen3, got" in same
    linear = said("--vision", vision, "--language", vision, "--projector", "linear")
    assert "must be a folder of a qwen3, got" in linear
    with pytest.raises(ValueError, match="--output: must not exist"):
        assemble(vision, vision, vision)
