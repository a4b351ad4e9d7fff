"""Videos reach Qwen's models as images in a batch; stock takes `pixel_values_videos` instead."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoProcessor

from tests.data.chats import encoded_image
from tests.data.media import clip, decoded, sound
from tests.data.packs import MODEL
from tests.models.stock import stock_twin
from tests.models.test_text import shake
from triptych_data.batch import collate
from triptych_data.media.audio import load_wave
from triptych_data.media.config import VideoConfig
from triptych_data.media.images import decode_image
from triptych_data.processor import Processor
from triptych_data.sample import RawSample, heard_parts, media_parts
from triptych_models.config import ModelConfig
from triptych_models.families import build_model
from triptych_models.generate import generate

NAMES = ("qwen2_5_vl_tiny", "qwen2_5_omni_tiny", "qwen3_omni_tiny")
FOLDERS = [MODEL, *(MODEL.with_name(name) for name in NAMES)]
# The last's positions are not whole at three frames a second.
CASES = [*((folder, 2) for folder in FOLDERS), (FOLDERS[-1], 3)]
# Qwen-Omni's processors heed no size or rate of a file.
OMNI = {"size": {"shortest_edge": 1024, "longest_edge": 4096}, "do_sample_frames": True}
SAMPLES = {
    "video": (["video"], [clip(40)]),
    "image and two videos": (
        ["image", "video", "video"],
        [encoded_image(64, 32), clip(30, size=(64, 32)), clip(26, rate=13)],
    ),
    "text": ([], []),
}
FLAC = {"kind": "matroska", "heard": 3.0}
# Videos with their sound: one shorter than its pictures, one longer. All are of one length: of
# several, stock's Qwen3-Omni pads a short one before it makes frames of it.
HEARD_TOO = (
    ["image", "heard", "text", "heard", "audio"],
    [
        encoded_image(64, 32),
        clip(130, size=(32, 32), **FLAC),
        clip(26, rate=13, size=(64, 32), **FLAC),
        sound(3.0),
    ],
)
HEARD = (["audio", "video", "audio"], [sound(0.9), clip(130, size=(32, 32)), sound(0.4)])


def sample(kinds, media):
    numbers, parts = iter(range(len(media))), []
    for kind in kinds:
        if kind == "text":
            parts.append({"type": "text", "text": "and"})
        elif kind == "heard":
            parts.append({"type": "video", "index": next(numbers), "sound": True})
        else:
            parts.append({"type": kind, "index": next(numbers)})
    content = [{"type": "text", "text": "Look: "}, *parts, {"type": "text", "text": "What?"}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": "A boat at sea."},
    ]
    return RawSample("k", "x", {"messages": messages}, media)


def encode(processor, names):
    """Samples of these names, of several and a model that hears also some with sound; encoded."""
    raws = [sample(*SAMPLES[name]) for name in names]
    if processor.num_mels and len(names) > 1:
        raws += [sample(*HEARD), sample(*HEARD_TOO)]
    return raws, [processor.encode(raw) for raw in raws]


def stock_inputs(stock, fps, raw, add_generation_prompt=False):
    """What stock makes of a sample, or of its question; clips have 24 or 13 frames a second."""
    media = [(kind, raw.media[index]) for kind, index in media_parts(raw.json)]
    videos = [decoded(data) for kind, data in media if kind == "video"]
    rates = [13 if len(frames) == 26 else 24 for frames in videos]
    metadata = [
        {"total_num_frames": len(f), "fps": rate, "width": f.shape[2], "height": f.shape[1]}
        for f, rate in zip(videos, rates, strict=True)
    ]
    messages = raw.json["messages"][: 1 if add_generation_prompt else 2]
    text = stock.apply_chat_template(messages, add_generation_prompt=add_generation_prompt)
    settings = {"videos_kwargs": {"video_metadata": metadata} if videos else {}}
    if hasattr(stock, "feature_extractor"):
        heard = heard_parts(raw.json)
        waves = [
            load_wave(data, 16_000, kind=kind).numpy()
            for (kind, data), is_heard in zip(media, heard, strict=True)
            if kind == "audio" or is_heard
        ]
        settings = {
            "videos_kwargs": settings["videos_kwargs"] | OMNI | {"fps": fps},
            "audio": waves or None,
        }
        settings["videos_kwargs"]["use_audio_in_video"] = any(heard)
        settings["videos_kwargs"]["position_id_per_seconds"] = 25
    found = stock(
        text=[text],
        images=[decode_image(data) for kind, data in media if kind == "image"] or None,
        videos=videos or None,
        return_tensors="pt",
        **settings,
    )
    if hasattr(stock, "feature_extractor") and any(heard):
        found["use_audio_in_video"] = True
    return found


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0].name} at {case[1]}")
def models(request):
    """A model, stock's, our processor, and what makes inputs of stock."""
    folder, fps = request.param
    model = build_model(ModelConfig(path=folder, init="random"), dtype=torch.float32)
    shake(model)
    model.eval()  # routers' losses, which stock's loss has not, are training's
    small = VideoConfig(fps=fps, frame_pixels=tuple(OMNI["size"].values()))
    video = small if "omni" in folder.name else None
    processor = Processor.from_directory(folder, video=video)
    model.check_processor(processor)
    stock = AutoProcessor.from_pretrained(folder)
    return model, stock_twin(model), processor, partial(stock_inputs, stock, fps)


@pytest.mark.parametrize("names", [[name] for name in SAMPLES] + [list(SAMPLES)])
def test_logits_of_packed_videos_equal_stocks_one_by_one(models, names):
    model, twin, processor, stock = models
    raws, encoded = encode(processor, names)
    seq_len = sum(len(sample.input_ids) for sample in encoded) + 9
    batch = collate(encoded, seq_len, pad_token_id=processor.pad_token_id)
    keep = ("shift_labels", "num_targets", "num_tokens", "sample_keys")
    with torch.no_grad():
        logits = model.logits(**{k: v for k, v in batch.items() if k not in keep})[0]
        expected = torch.cat([twin(**stock(raw)).logits[0] for raw in raws])
    torch.testing.assert_close(logits[: len(expected)], expected, rtol=1e-4, atol=1e-4)
    assert len(expected) == seq_len - 9


def test_loss_and_gradients_of_packed_videos_are_stocks(models):
    model, twin, processor, stock = models
    raws, encoded = encode(processor, list(SAMPLES))
    seq_len = sum(len(each.input_ids) for each in encoded) + 9
    batch = collate(encoded, seq_len, pad_token_id=processor.pad_token_id)
    ours = model(**{k: v for k, v in batch.items() if k not in ("num_tokens", "sample_keys")})
    ours.loss_sum.backward()
    losses = [
        F.cross_entropy(twin(**stock(raw)).logits[0], each.shift_labels, reduction="sum")
        for raw, each in zip(raws, encoded, strict=True)
    ]
    torch.stack(losses).sum().backward()
    torch.testing.assert_close(ours.loss_sum, torch.stack(losses).sum(), rtol=1e-6, atol=0)
    wanted, found = dict(twin.named_parameters()), dict(model.hf.named_parameters())
    taught = {name: p for name, p in wanted.items() if p.grad is not None}
    whole = torch.stack([p.grad.norm() for p in taught.values()]).norm()
    assert len(taught) >= len(wanted) - 1  # a table that a tower holds and never reads
    for name, parameter in taught.items():
        difference = (found[name].grad - parameter.grad).norm()
        assert difference <= 1e-5 * parameter.grad.norm() + 1e-7 * whole, name
        found[name].grad = parameter.grad = None


def test_answers_to_videos_are_stocks(models):
    model, twin, processor, stock = models
    raws, _ = encode(processor, list(SAMPLES))
    prompts = [processor.encode_prompt(raw)[0] for raw in raws]
    settings = {"max_new_tokens": 8, "pad_token_id": processor.pad_token_id}
    stop = processor.eos_token_id
    answers = generate(model, prompts, eos_token_id=stop, **settings)
    for raw, prompt, answer in zip(raws, prompts, answers, strict=True):
        inputs = stock(raw, add_generation_prompt=True)
        assert inputs["input_ids"][0].tolist() == prompt.input_ids.tolist()
        tokens = twin.generate(**inputs, do_sample=False, eos_token_id=stop, **settings)
        assert answer == tokens[0, len(prompt.input_ids) :].tolist()
