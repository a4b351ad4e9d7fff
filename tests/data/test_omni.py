"""What Qwen-Omni hears: frames, tokens and positions of stock's processor, logits it computes.

Of its videos the frames, sizes and positions; tests/models/test_video.py goes on to gradients.
"""

import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    Qwen2VLVideoProcessor,
    WhisperFeatureExtractor,
)
from transformers.image_utils import SizeDict
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniThinkerModel
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeThinkerModel
from transformers.models.qwen3_omni_moe.processing_qwen3_omni_moe import (
    _get_feat_extract_output_lengths as qwen3_tokens,
)
from transformers.video_utils import VideoMetadata

from tests.data.media import sound
from tests.data.packs import MODEL
from tests.data.test_audio import voice
from tests.data.test_images import photo, save
from tests.models.stock import stock_twin
from triptych_data.batch import collate
from triptych_data.media.audio import AudioRules, audio_tokens, heard, heard_frames, load_wave
from triptych_data.media.config import VideoConfig
from triptych_data.media.images import decode_image
from triptych_data.media.positions import mrope_positions
from triptych_data.media.probe import probe_media
from triptych_data.media.rules import read_audio_rules, read_video_rules
from triptych_data.media.video import video_layout
from triptych_data.processor import Processor
from triptych_data.sample import RawSample
from triptych_data.shards.index import MediaColumns
from triptych_models.config import ModelConfig
from triptych_models.families import build_model

OMNI = MODEL.with_name("qwen2_5_omni_tiny")
FOLDERS = {"2.5": OMNI, "3": MODEL.with_name("qwen3_omni_tiny")}
NO_INPUT = ("shift_labels", "num_targets", "num_tokens", "sample_keys")


def sample(*media: float | tuple[int, int]) -> RawSample:
    """A chat about recordings of these seconds and photos of these widths and heights."""
    files, parts = [], []
    for index, medium in enumerate(media):
        kind = "image" if isinstance(medium, tuple) else "audio"
        parts += [{"type": kind, "index": index}, {"type": "text", "text": "and"}]
        files.append(save(photo(*medium)) if isinstance(medium, tuple) else sound(medium))
    messages = [
        {"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A boat at sea."},
    ]
    return RawSample("k", "x", {"messages": messages}, files)


def stock_inputs(stock: Any, raw: RawSample) -> Any:
    text = stock.apply_chat_template(raw.json["messages"], tokenize=False)
    kinds = [part["type"] for part in raw.json["messages"][0]["content"] if "index" in part]
    heard = [d for k, d in zip(kinds, raw.media, strict=True) if k == "audio"]
    seen = [d for k, d in zip(kinds, raw.media, strict=True) if k == "image"]
    return stock(
        text=[text],
        audio=[load_wave(data, 16_000).numpy() for data in heard] or None,
        images=[decode_image(data) for data in seen] or None,
        return_tensors="pt",
    )


@pytest.mark.parametrize("version", FOLDERS)
def test_packed_samples_are_stocks_one_by_one(version: str) -> None:
    """Frames to 2e-5 of a log10, tokens, and the logits of text, sound, images and both."""
    folder = FOLDERS[version]
    model: Any = build_model(ModelConfig(path=folder, init="random"), dtype=torch.float32)
    processor, twin = Processor.from_directory(folder), stock_twin(model)
    model.check_processor(processor)
    raws = [sample(), sample(0.31), sample((64, 96), 1.23), sample(0.4, 0.07, (40, 40))]
    if version == "3":  # several of other lengths, stock pads before it makes frames of them
        raws[-1] = sample(2.117, (40, 40))
    encoded = [processor.encode(raw) for raw in raws]
    stock = AutoProcessor.from_pretrained(folder)
    expected = [stock_inputs(stock, raw) for raw in raws]
    for ours, theirs in zip(encoded, expected, strict=True):
        assert ours.input_ids.tolist() == theirs["input_ids"][0].tolist()
        if ours.audio_features is None:
            assert "input_features" not in theirs
            continue
        mask = theirs["feature_attention_mask"].bool()
        assert ours.audio_lengths.tolist() == mask.sum(1).tolist()
        wanted = theirs["input_features"].mT[mask]
        torch.testing.assert_close(ours.audio_features, wanted, rtol=0, atol=2e-5)
    seq_len = sum(len(each.input_ids) for each in encoded) + 9
    batch = collate(encoded, seq_len, pad_token_id=processor.pad_token_id)
    with torch.no_grad():
        logits = model.logits(**{k: v for k, v in batch.items() if k not in NO_INPUT})[0]
        alone = torch.cat([twin(**inputs).logits[0] for inputs in expected])
    torch.testing.assert_close(logits[: len(alone)], alone, rtol=1e-4, atol=1e-4)


def test_what_aero_hears_is_whispers_with_the_silence_behind() -> None:
    """Of each recording two frames more; tokens where the template has one; stock's logits."""
    folder = MODEL.with_name("aero_tiny")
    model: Any = build_model(ModelConfig(path=folder, init="random"), dtype=torch.float32)
    processor, twin = Processor.from_directory(folder), stock_twin(model)
    model.check_processor(processor)
    raws = [sample(), sample(0.31), sample(0.505, 0.07)]
    encoded = [processor.encode(raw) for raw in raws]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    whisper = WhisperFeatureExtractor.from_pretrained(folder)
    alone = []
    for ours, raw in zip(encoded, raws, strict=True):
        counts = iter([int(n - 1) // 4 + (int(n - 1) % 4 > 1) for n in ours.audio_lengths])
        text = tokenizer.apply_chat_template(
            [bare(message) for message in raw.json["messages"]], tokenize=False
        )
        text = re.sub(r"<\|AUDIO\|>", lambda _, c=counts: "<|AUDIO|>" * next(c), text)
        assert ours.input_ids.tolist() == tokenizer(text)["input_ids"]
        inputs = {"input_ids": ours.input_ids[None]}
        if ours.audio_features is not None:
            waves = [load_wave(data, 16_000).numpy() for data in raw.media]
            options = {"sampling_rate": 16_000, "return_tensors": "pt"}
            found = whisper(waves, return_attention_mask=True, **options)
            lengths = found["attention_mask"].sum(1)
            assert ours.audio_lengths.tolist() == lengths.tolist()
            rows = [f.T[: n + 2] for f, n in zip(found["input_features"], lengths, strict=True)]
            torch.testing.assert_close(ours.audio_features, torch.cat(rows), rtol=0, atol=2e-5)
            inputs["input_features"] = found["input_features"]
            inputs["feature_attention_mask"] = found["attention_mask"]
        with torch.no_grad():
            alone.append(twin(**inputs, attention_mask=torch.ones_like(inputs["input_ids"])))
    seq_len = sum(len(each.input_ids) for each in encoded) + 9
    batch = collate(encoded, seq_len, pad_token_id=processor.pad_token_id, position_axes=1)
    with torch.no_grad():
        logits = model.logits(**{k: v for k, v in batch.items() if k not in NO_INPUT})[0]
    wanted = torch.cat([each.logits[0] for each in alone])
    torch.testing.assert_close(logits[: len(wanted)], wanted, rtol=1e-4, atol=1e-4)


def bare(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose recordings have no index."""
    content = message["content"]
    if isinstance(content, str):
        return message
    return message | {"content": [{k: v for k, v in p.items() if k != "index"} for p in content]}


@pytest.mark.parametrize("seconds", [2.9999, 3.0, 3.4])
def test_behind_the_longest_recording_there_is_nothing(seconds: float) -> None:
    """Zeros, as the convolutions of stock's tower pad it."""
    rules = AudioRules(num_mels=32, max_seconds=3.0)
    with_more = heard(voice(seconds), rules._replace(behind=2))
    plain = heard(voice(seconds), rules)
    torch.testing.assert_close(with_more[:-2], plain, rtol=0, atol=0)
    assert len(plain) == 300 and not with_more[300:].any()


@pytest.mark.parametrize("seconds", [0.021, 0.5, 1.0 / 3, 2.9999, 3.0, 3.09])
def test_frames_are_those_of_whisper_with_silence_behind(seconds: float) -> None:
    """Also of what a codec has added to three seconds; the index tells how many there are."""
    rules, wave = AudioRules(num_mels=32, max_seconds=3.0), voice(seconds)
    stock = WhisperFeatureExtractor(feature_size=32, chunk_length=3)
    options = {"sampling_rate": 16_000, "return_tensors": "pt", "return_attention_mask": True}
    found = stock(wave.numpy(), **options)
    wanted = found["input_features"][0].T[found["attention_mask"][0].bool()]
    frames = heard(wave, rules)
    torch.testing.assert_close(frames, wanted, rtol=0, atol=2e-5)
    assert len(frames) == heard_frames(len(wave) / 16_000, rules)


@pytest.mark.parametrize("seconds", [0.021, 0.5, 1.0 / 3, 2.9999])
def test_frames_of_chunks_are_those_of_whisper_alone(seconds: float) -> None:
    rules, wave = AudioRules(num_mels=32, chunk=100), voice(seconds)
    stock = WhisperFeatureExtractor(feature_size=32)
    options = {"sampling_rate": 16_000, "return_tensors": "pt", "return_attention_mask": True}
    found = stock(wave.numpy(), padding=True, **options)
    assert found["attention_mask"].all()
    frames = heard(wave, rules)
    torch.testing.assert_close(frames, found["input_features"][0].T, rtol=0, atol=2e-5)
    assert len(frames) == heard_frames(len(wave) / 16_000, rules)
    counts = qwen3_tokens(torch.arange(1, 400))
    assert [audio_tokens(n, 100) for n in range(1, 400)] == counts.tolist()


@pytest.mark.parametrize("seconds", [0.05, 1.0, 3.337])
@pytest.mark.parametrize("kind", ["wav", "flac", "mp3"])
def test_measuring_from_the_index_is_encoding(seconds: float, kind: str) -> None:
    processor = Processor.from_directory(OMNI)
    codec = {"wav": "pcm_s16le", "flac": "flac", "mp3": "libmp3lame"}[kind]
    data = sound(seconds, kind=kind, codec=codec, rate=44_100)
    raw = sample(1.0)
    raw = RawSample(raw.key, raw.where, raw.json, [data])
    info = probe_media(data, "audio", "x")
    columns = MediaColumns(
        np.array([2]), np.zeros((1, 2), np.int32), np.array([0]), np.array([info.seconds])
    )
    encoded, measured = processor.encode(raw), processor.measure(raw.json, columns)
    assert measured.num_tokens == len(encoded.input_ids)
    assert measured.audio_frames == int(encoded.audio_lengths.sum())
    tokens = audio_tokens(int(encoded.audio_lengths[0]))
    assert processor.media_tokens(info) == len(encoded.audio_positions) == tokens


def test_what_is_longer_than_the_model_hears_is_a_bad_sample() -> None:
    """Not cut off: its text would speak of what nobody heard."""
    processor, rules = Processor.from_directory(OMNI), read_audio_rules(OMNI)
    assert rules is not None
    most = rules.max_seconds
    processor.encode(sample(most + 0.05))
    with pytest.raises(
        ValueError, match=r"audio 0: audio must be at most .* split it and its text"
    ):
        processor.encode(sample(most + 1))
    with pytest.raises(ValueError, match="must be at most"):
        heard_frames(most + 1, rules)


def test_what_is_too_short_for_a_token_is_a_bad_sample() -> None:
    with pytest.raises(ValueError, match="audio 0: audio must be long enough for a token"):
        Processor.from_directory(OMNI).encode(sample(0.01))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feature_size": None}, "feature_size must be from 1"),
        ({"dither": 0.1}, "dither must be 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = Path(shutil.copytree(OMNI, tmp_path / "model"))
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        Processor.from_directory(folder)


def test_a_processor_of_another_models_sound_is_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(OMNI, tmp_path / "model"))
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "feature_size": 80}))
    model = build_model(ModelConfig(path=folder, init="random"), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"num_mels of the processor files must be .* 32, got 80"):
        model.check_processor(Processor.from_directory(folder))


@pytest.mark.parametrize("version", FOLDERS)
def test_layouts_and_positions_of_any_video_are_stocks(tmp_path: Path, version: str) -> None:
    """Also at rates of frames that no second divides; a folder's own bounds are not heeded."""
    folder = Path(shutil.copytree(FOLDERS[version], tmp_path / "model"))
    side = {"2.5": 28, "3": 32}[version]
    class_of = {"2.5": Qwen2_5OmniThinkerModel, "3": Qwen3OmniMoeThinkerModel}[version]
    stock = Qwen2VLVideoProcessor(patch_size=8, do_sample_frames=True)
    bounds = SizeDict(shortest_edge=128 * side**2, longest_edge=768 * side**2)
    names = ("image", "video", "audio", "vision_start", "audio_start")
    config = SimpleNamespace(**{f"{name}_token_id": n for n, name in enumerate(names, 1)})
    config.position_id_per_seconds, config.seconds_per_chunk = 25, 2
    model = SimpleNamespace(config=config, spatial_merge_size=2)
    model.get_llm_pos_ids_for_vision = class_of.get_llm_pos_ids_for_vision.__get__(model)
    rng = np.random.default_rng(0)
    for number in range(60):
        count, width, height = (int(x) for x in rng.integers((2, 40, 40), (900, 900, 900)))
        rate = float(rng.choice([1, 12.5, 24, 25, 30, 30000 / 1001, 60]))
        fps = float(rng.choice([1, 2, 3, 4, 7]))
        rules = read_video_rules(folder, VideoConfig(fps=fps))
        assert rules is not None
        frames = stock.sample_frames(VideoMetadata(total_num_frames=count, fps=rate), fps=fps)
        layout = video_layout(width, height, count, count / rate, rules)
        # Rounding now and then gives one more, which stock repeats where it cuts patches.
        assert layout.frames.tolist() == [*frames, *[frames[-1]] * (len(frames) % 2)]
        nothing = torch.empty(1, len(frames), 3, height, width, device="meta")
        resized = stock.resize(nothing, bounds, factor=16, resample=3)
        assert layout.grid == (-(-len(frames) // 2), *(n // 8 for n in resized.shape[-2:]))
        grid = (layout.grid[0], *(2 * int(n) for n in rng.integers(1, 9, 2)))
        ids = [0, 0, 4, *[2] * (math.prod(grid) // 4), 0, 0, 4, *[1] * 6, 0, 3 * (number % 2), 0]
        expected, _ = class_of.get_rope_index(
            model,
            torch.tensor([ids]),
            image_grid_thw=torch.tensor([[1, 4, 6]]),
            video_grid_thw=torch.tensor([grid]),
            attention_mask=torch.ones(1, len(ids)),
            second_per_grids=torch.tensor([2 / fps]),
        )
        is_seen, grids = np.isin(ids, [1, 2]), np.array([grid, (1, 4, 6)])
        fractional = rules.fractional
        assert fractional == (version == "3" and fps > 2)
        found = mrope_positions(is_seen, grids, 2, [layout.times, None], fractional=fractional)
        wanted = expected[:, 0].numpy()
        # Stock adds in single precision, place after place.
        assert np.allclose(found, wanted, rtol=2e-6 if fractional else 0, atol=0)


def test_a_published_folder_has_no_file_for_videos(tmp_path: Path) -> None:
    """Nor is its config.json the thinker's."""
    folder = Path(shutil.copytree(FOLDERS["3"], tmp_path / "model"))
    (folder / "video_preprocessor_config.json").unlink()
    config = {"model_type": "qwen3_omni_moe", "thinker_config": {"position_id_per_seconds": 13}}
    (folder / "config.json").write_text(json.dumps(config))
    rules = Processor.from_directory(folder).parts["video"]
    assert rules["tmrope"] and rules["tokens_per_second"] == 13 and rules["fps"] == 1
    assert (rules["min_pixels"], rules["max_pixels"]) == (128 * 32**2, 768 * 32**2)
    three = Processor.from_directory(folder, video=VideoConfig(fps=3))
    assert three.fractional and three.parts["video"]["fractional"]
    assert three.encode(sample()).position_ids.dtype == torch.float32


def test_bounds_of_a_frame_are_refused_where_a_video_is_many_images() -> None:
    bounds = VideoConfig(frame_pixels=(1024, 4096))
    with pytest.raises(ValueError, match="frame_pixels: must be left out for a model whose videos"):
        Processor.from_directory(MODEL, video=bounds)
    with pytest.raises(ValueError, match="must be two positive numbers in order, got 9, 8"):
        VideoConfig(frame_pixels=(9, 8))
