"""LLaVA-OneVision-1.5's images: Qwen2.5-VL's processor, patches of one frame, plain positions."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor

from tests.data.against_stock import packed_as_alone, sample
from tests.data.media import clip
from tests.data.packs import MODEL
from tests.models import straight_rice
from tests.models.stock import stock_twin
from tests.models.test_text import shake
from triptych_data.media.images import decode_image
from triptych_data.processor import Processor
from triptych_data.sample import RawSample
from triptych_models.config import ModelConfig
from triptych_models.families import build_model
from triptych_models.generate import generate

PATCH = 14
SIZES: list[list[tuple[int, int]]] = [[], [(28, 56)], [(140, 84), (30, 64)], [(100, 20)]]


def write_folder(path: Path) -> Path:
    """A folder as the hub has them; its file for videos has the patches of another tower."""
    path.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(MODEL / name, path / name)
    tokenizer = json.loads((MODEL / "tokenizer_config.json").read_text())
    tokenizer["processor_class"] = "Qwen2_5_VLProcessor"
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    ids = json.loads((MODEL / "config.json").read_text())
    names = ("image_token_id", "video_token_id")
    straight_rice.write_model_dir(path, **{name: ids[name] for name in names})
    config = json.loads((path / "config.json").read_text())
    config["vision_config"]["patch_size"] = PATCH
    config["text_config"]["vocab_size"] = 512
    (path / "config.json").write_text(json.dumps(config))
    images = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "min_pixels": (2 * PATCH) ** 2,
        "max_pixels": 40 * (2 * PATCH) ** 2,
        "patch_size": PATCH,
        "merge_size": 2,
        "temporal_patch_size": 1,
        "image_mean": [0.48, 0.46, 0.41],
        "image_std": [0.27, 0.26, 0.28],
    }
    (path / "preprocessor_config.json").write_text(json.dumps(images))
    videos = images | {"video_processor_type": "Qwen2VLVideoProcessor", "temporal_patch_size": 2}
    (path / "video_preprocessor_config.json").write_text(json.dumps(videos))
    return path


def test_tokens_and_logits_of_packed_samples_are_those_one_by_one(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model")
    batch = packed_as_alone(folder, SIZES)
    assert batch["position_ids"].shape == batch["input_ids"].shape
    assert batch["pixel_values"].shape[1] == 3 * PATCH**2


def test_answers_are_those_one_by_one(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model")
    model = build_model(ModelConfig(path=folder, init="random"), dtype=torch.float32)
    shake(model)
    twin, stock = stock_twin(model), AutoProcessor.from_pretrained(folder)
    processor = Processor.from_directory(folder)
    raws = [sample(sizes) for sizes in SIZES]
    prompts = [processor.encode_prompt(raw)[0] for raw in raws]
    settings = {"max_new_tokens": 5, "eos_token_id": 511, "pad_token_id": processor.pad_token_id}
    answers = generate(model, prompts, **settings)
    for raw, prompt, answer in zip(raws, prompts, answers, strict=True):
        messages = raw.json["messages"][:1]
        text = stock.apply_chat_template(messages, add_generation_prompt=True)
        images = [decode_image(data) for data in raw.media] or None
        inputs = stock(text=[text], images=images, return_tensors="pt")
        tokens = twin.generate(**inputs, do_sample=False, **settings)
        assert answer == tokens[0, len(prompt.input_ids) :].tolist()


@pytest.mark.parametrize("frames", [1, 2])
def test_videos_are_refused_whatever_the_patches_that_a_file_says(
    tmp_path: Path, frames: int
) -> None:
    """The published file says two frames a patch, the tower has one."""
    folder = write_folder(tmp_path / "model")
    file = folder / "video_preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"temporal_patch_size": frames}))
    chat = [
        {"role": "user", "content": [{"type": "video", "index": 0}]},
        {"role": "assistant", "content": "7"},
    ]
    raw = RawSample("a", "x", {"messages": chat}, [clip(4)])
    with pytest.raises(ValueError, match=r"got video, for which .* its family no place"):
        Processor.from_directory(folder).encode(raw)
