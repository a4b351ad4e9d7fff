"""LLaVA-OneVision's images and videos: the tiles and tokens of stock, the gradients it computes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoProcessor, AutoTokenizer

from tests.data.media import clip, decoded
from tests.data.model_folders import model_folder
from tests.data.test_images import photo, save
from tests.models import tiny_onevision
from tests.models.stock import stock_twin
from tests.models.test_text import shake
from triptych_data.batch import collate
from triptych_data.media.config import VideoConfig
from triptych_data.media.images import decode_image
from triptych_data.media.probe import probe_media
from triptych_data.media.taps import frame_taps
from triptych_data.processor import Processor
from triptych_data.sample import RawSample, media_parts
from triptych_data.shards.index import MediaColumns
from triptych_models.config import ModelConfig
from triptych_models.families import build_model
from triptych_models.generate import generate

# Images before videos before text, as published.
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role }}{% if m.content is string %}"
    "{{ '\n' + m.content }}{% else %}"
    "{% for c in m.content %}{% if c.type == 'image' %}{{ ' <image>\n' }}{% endif %}{% endfor %}"
    "{% for c in m.content %}{% if c.type == 'video' %}{{ ' <video>\n' }}{% endif %}{% endfor %}"
    "{% for c in m.content %}{% if c.type == 'text' %}{{ '\n' + c.text }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NAMES = {"image_token": "<image>", "video_token": "<video>"}
MEAN, STD = [0.48, 0.45, 0.4], [0.26, 0.27, 0.28]
TILE, SIDE = tiny_onevision.TILE, tiny_onevision.SIDE
SAMPLES: dict[str, list[tuple[str, bytes]]] = {
    "text": [],
    "one image": [("image", save(photo(50, 20)))],
    "shrunk": [("image", save(photo(60, 61)))],
    "several": [("image", save(photo(40, 16))), ("image", save(photo(30, 64)))],
    "image and videos": [
        ("image", save(photo(9, 33))),
        ("video", clip(50)),
        ("video", clip(50, size=(64, 32))),
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the hub has them, of a tiny LLaVA-OneVision."""
    path = tmp_path_factory.mktemp("llava_onevision")
    model_folder(path, TEMPLATE, [*NAMES.values()], extra_special_tokens=NAMES)
    ids = AutoTokenizer.from_pretrained(path).get_vocab()
    tokens = {"image_token_index": ids["<image>"], "video_token_index": ids["<video>"]}
    tiny_onevision.write_model_dir(path, **tokens)
    config = json.loads((path / "config.json").read_text())
    config["text_config"]["vocab_size"] = 600
    (path / "config.json").write_text(json.dumps(config))
    images = {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "processor_class": "LlavaOnevisionProcessor",
        "size": {"height": TILE, "width": TILE},
        "image_grid_pinpoints": config["image_grid_pinpoints"],
        "image_mean": MEAN,
        "image_std": STD,
    }
    (path / "preprocessor_config.json").write_text(json.dumps(images))
    videos = {name: images[name] for name in ("size", "image_mean", "image_std")}
    videos |= {"video_processor_type": "LlavaOnevisionVideoProcessor", "do_sample_frames": True}
    (path / "video_preprocessor_config.json").write_text(
        json.dumps(videos | {"num_frames": 3, "fps": None})
    )
    processor = {
        "processor_class": "LlavaOnevisionProcessor",
        "num_image_tokens": SIDE**2,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_2",
        **NAMES,
    }
    (path / "processor_config.json").write_text(json.dumps(processor))
    return path


def sample(name: str) -> RawSample:
    media = SAMPLES[name]
    parts: list[dict[str, Any]] = [{"type": kind, "index": i} for i, (kind, _) in enumerate(media)]
    messages = [
        {"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A boat at sea."},
    ]
    return RawSample("k", "x", {"messages": messages}, [data for _, data in media])


def stock_inputs(stock: Any, raw: RawSample, **settings: Any) -> Any:
    media = [(kind, raw.media[index]) for kind, index in media_parts(raw.json)]
    images = [decode_image(data) for kind, data in media if kind == "image"]
    videos = [decoded(data) for kind, data in media if kind == "video"]
    metadata = [{"total_num_frames": len(frames), "fps": 24} for frames in videos]
    messages = raw.json["messages"][: 1 if settings else 2]
    return stock(
        text=[stock.apply_chat_template(messages, tokenize=False, **settings)],
        images=[images] if images else None,
        videos=videos or None,
        video_metadata=metadata or None,
        return_tensors="pt",
    )


@pytest.fixture(scope="module")
def models(folder: Path) -> Any:
    model: Any = build_model(ModelConfig(path=folder, init="random"), dtype=torch.float32)
    shake(model)
    processor = Processor.from_directory(folder)
    model.check_processor(processor)
    return model, stock_twin(model), processor, AutoProcessor.from_pretrained(folder)


def test_tokens_and_gradients_of_packed_samples_are_stocks_one_by_one(models: Any) -> None:
    model, twin, processor, stock = models
    raws = [sample(name) for name in SAMPLES]
    encoded = [processor.encode(raw) for raw in raws]
    expected = [stock_inputs(stock, raw) for raw in raws]
    for raw, ours, theirs in zip(raws, encoded, expected, strict=True):
        assert ours.input_ids.tolist() == theirs["input_ids"][0].tolist()
        infos = [probe_media(raw.media[i], kind, "x") for kind, i in media_parts(raw.json)]
        measured = processor.measure(raw.json, MediaColumns.of(infos))
        patches = 0 if ours.pixel_values is None else len(ours.pixel_values)
        counts = (len(ours.input_ids), ours.num_targets, patches, len(ours.image_grid_thw))
        assert measured[:4] == counts
    settings = {"pad_token_id": processor.pad_token_id, "position_axes": processor.position_axes}
    row = collate(encoded, sum(len(each.input_ids) for each in encoded) + 9, **settings)
    batch = {name: x for name, x in row.items() if name not in ("num_tokens", "sample_keys")}
    loss = model(**batch).loss_sum
    losses = [
        F.cross_entropy(twin(**inputs).logits[0], each.shift_labels, reduction="sum")
        for inputs, each in zip(expected, encoded, strict=True)
    ]
    torch.testing.assert_close(loss, torch.stack(losses).sum(), rtol=1e-6, atol=0)
    loss.backward()
    torch.stack(losses).sum().backward()
    found = dict(model.hf.named_parameters())
    wanted = {name: p for name, p in twin.named_parameters() if p.grad is not None}
    whole = torch.stack([p.grad.norm() for p in wanted.values()]).norm()
    assert "model.image_newline" in wanted and len(wanted) > 40
    for name, parameter in wanted.items():
        difference = (found[name].grad - parameter.grad).norm()
        assert difference <= 2e-5 * parameter.grad.norm() + 1e-7 * whole, name


def test_answers_are_stocks(models: Any) -> None:
    model, twin, processor, stock = models
    raws = [sample(name) for name in SAMPLES]
    prompts = [processor.encode_prompt(raw)[0] for raw in raws]
    settings = {"max_new_tokens": 5, "pad_token_id": processor.pad_token_id, "eos_token_id": 599}
    answers = generate(model, prompts, **settings)
    for raw, prompt, answer in zip(raws, prompts, answers, strict=True):
        inputs = stock_inputs(stock, raw, add_generation_prompt=True)
        tokens = twin.generate(**inputs, do_sample=False, **settings)
        assert answer == tokens[0, len(prompt.input_ids) :].tolist()


def test_frames_are_one_a_second_up_to_thirty_two(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        if file.name != "video_preprocessor_config.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    processor = Processor.from_directory(tmp_path)
    info = probe_media(clip(50), "video", "x")
    assert processor.frame_times(info) == [0, 25 / 24]
    long = info._replace(frames=24 * 1000, seconds=1000.0)
    assert len(processor.frame_times(long)) == 32
    fewer = Processor.from_directory(tmp_path, video=VideoConfig(max_frames=5, fps=0.1))
    assert fewer.media_tokens(long) == 5 * 2 * 2 + 1
    with pytest.raises(ValueError, match=r"data.video.max_pixels: must be left out"):
        Processor.from_directory(tmp_path, video=VideoConfig(max_pixels=10_000))


@pytest.mark.parametrize("side", [2, 3, 27])
def test_pooled_frames_are_torchs_bilinear(side: int) -> None:
    features = torch.randn(2, side, side, 5)
    taps = frame_taps(2, side)
    rows = torch.cat([features.flatten(0, 2), torch.zeros(1, 5)])
    found = (rows[taps.features] * taps.weights[:, :, None]).sum(1)
    size = [-(-side // 2)] * 2
    expected = F.interpolate(features.permute(0, 3, 1, 2), size, mode="bilinear")
    assert taps.features[-1, 0] == -1 and len(found) == 2 * int(np.prod(size)) + 1
    torch.testing.assert_close(found[:-1], expected.permute(0, 2, 3, 1).flatten(0, 2))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("preprocessor_config.json", {"image_grid_pinpoints": [[14, 15]]}, "each a multiple of 14"),
        ("preprocessor_config.json", {"image_grid_pinpoints": []}, "each a multiple of 14"),
        ("processor_config.json", {"vision_aspect_ratio": "pad"}, "must be anyres_max_ and a"),
        ("video_preprocessor_config.json", {"size": {"height": 8, "width": 8}}, "14 x 14"),
        ("video_preprocessor_config.json", {"num_frames": 0}, "must be positive"),
    ],
)
def test_files_that_ask_for_other_things_are_refused(
    folder: Path, tmp_path: Path, file: str, change: dict[str, Any], message: str
) -> None:
    for each in folder.iterdir():
        (tmp_path / each.name).write_bytes(each.read_bytes())
    settings = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps(settings | change))
    with pytest.raises(ValueError, match=message):
        Processor.from_directory(tmp_path)
