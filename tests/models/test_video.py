"""Videos reach Qwen3-VL as images in its batch; stock takes `pixel_values_videos` instead."""

import pytest
import torch
from transformers import AutoProcessor

from tests.data.chats import encoded_image
from tests.data.media import clip, decoded
from tests.data.packs import MODEL, tiny_processor
from tests.models.stock import stock_twin
from triptych_data.batch import collate
from triptych_data.media.images import decode_image
from triptych_data.sample import RawSample, media_parts
from triptych_models.config import ModelConfig
from triptych_models.families import build_model
from triptych_models.generate import generate

SAMPLES = {
    "video": (["video"], [clip(40)]),
    "image and two videos": (
        ["image", "video", "video"],
        [encoded_image(64, 32), clip(30, size=(64, 32)), clip(26, rate=13)],
    ),
    "text": ([], []),
}


def sample(kinds, media):
    parts = [{"type": kind, "index": i} for i, kind in enumerate(kinds)]
    content = [{"type": "text", "text": "Look: "}, *parts, {"type": "text", "text": "What?"}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": "A boat at sea."},
    ]
    return RawSample("k", "x", {"messages": messages}, media)


def stock_inputs(stock, raw, add_generation_prompt=False):
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
    return stock(
        text=[text],
        images=[decode_image(data) for kind, data in media if kind == "image"] or None,
        videos=videos or None,
        video_metadata=metadata or None,
        return_tensors="pt",
    )


@pytest.fixture(scope="module")
def models():
    model = build_model(ModelConfig(path=str(MODEL), init="random"), dtype=torch.float32)
    return model, stock_twin(model)


@pytest.mark.parametrize("names", [[name] for name in SAMPLES] + [list(SAMPLES)])
def test_logits_of_packed_videos_equal_stocks_one_by_one(models, names):
    model, twin = models
    stock = AutoProcessor.from_pretrained(MODEL)
    raws = [sample(*SAMPLES[name]) for name in names]
    encoded = [tiny_processor().encode(raw) for raw in raws]
    seq_len = sum(len(sample.input_ids) for sample in encoded) + 9
    batch = collate(encoded, seq_len, pad_token_id=tiny_processor().pad_token_id)
    keep = ("shift_labels", "num_targets", "num_tokens", "sample_keys")
    with torch.no_grad():
        logits = model.logits(**{k: v for k, v in batch.items() if k not in keep})[0]
        expected = torch.cat([twin(**stock_inputs(stock, raw)).logits[0] for raw in raws])
    torch.testing.assert_close(logits[: len(expected)], expected, rtol=1e-4, atol=1e-4)
    assert len(expected) == seq_len - 9


def test_answers_to_videos_are_stocks(models):
    model, twin = models
    stock = AutoProcessor.from_pretrained(MODEL)
    raws = [sample(*SAMPLES[name]) for name in SAMPLES]
    prompts = [tiny_processor().encode_prompt(raw)[0] for raw in raws]
    settings = {"max_new_tokens": 8, "pad_token_id": tiny_processor().pad_token_id}
    stop = tiny_processor().eos_token_id
    answers = generate(model, prompts, eos_token_id=stop, **settings)
    for raw, prompt, answer in zip(raws, prompts, answers, strict=True):
        inputs = stock_inputs(stock, raw, add_generation_prompt=True)
        assert inputs["input_ids"][0].tolist() == prompt.input_ids.tolist()
        tokens = twin.generate(**inputs, do_sample=False, eos_token_id=stop, **settings)
        assert answer == tokens[0, len(prompt.input_ids) :].tolist()
