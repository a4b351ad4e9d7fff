"""Videos with their sound: tokens and positions of stock, from shards to what is encoded."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniThinkerModel
from transformers.models.qwen2_5_omni.processing_qwen2_5_omni import Qwen2_5OmniProcessor
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeThinkerModel
from transformers.models.qwen3_omni_moe.processing_qwen3_omni_moe import Qwen3OmniMoeProcessor

from tests.data.media import clip, sound
from tests.data.packs import MODEL
from triptych_data.media.audio import audio_tokens
from triptych_data.media.clips import probe_sound
from triptych_data.media.config import VideoConfig
from triptych_data.media.positions import mrope_positions
from triptych_data.media.rules import read_audio_rules
from triptych_data.media.soundtrack import sound_order
from triptych_data.processor import Processor
from triptych_data.sample import RawSample
from triptych_data.shards.reader import Shards
from triptych_data.shards.scan import build_index
from triptych_data.shards.write import check_records, write_shards

NAMES = ("audio", "image", "video", "vision_bos", "vision_eos", "audio_bos", "audio_eos")
IDS = {name: number for number, name in enumerate(NAMES, 1)}
STOCK = {
    "2.5": (Qwen2_5OmniProcessor, Qwen2_5OmniThinkerModel),
    "3": (Qwen3OmniMoeProcessor, Qwen3OmniMoeThinkerModel),
}
FOLDERS = {v: MODEL.with_name(f"qwen{v.replace('.', '_')}_omni_tiny") for v in STOCK}


def stock_ids(version: str, grid: tuple[int, ...], heard: int, seconds: float) -> list[int]:
    """Of a text, a video with `heard` tokens of sound and a picture each `seconds`, and a text."""
    stock = SimpleNamespace(
        **{f"{name}_token": f"<{name}>" for name in NAMES},
        **{f"{kind}_processor": SimpleNamespace(merge_size=2) for kind in ("image", "video")},
    )
    processor, _ = STOCK[version]
    stock.get_chunked_index = processor.get_chunked_index.__get__(stock)
    (text,) = processor.replace_multimodal_special_tokens(
        stock,
        ["x<vision_bos><video><vision_eos>xx"],
        iter([heard]),
        iter([]),
        iter([np.array(grid)]),
        iter([seconds]),
        use_audio_in_video=True,
        position_id_per_seconds=25,
        seconds_per_chunk=2.0,
    )
    return [IDS.get(token.strip("<>"), 0) for token in re.findall(r"<\w+>|x", text)]


def stock_positions(version: str, ids: list[int], grid: Any, frames: int, seconds: float) -> Any:
    _, thinker = STOCK[version]
    names = {"vision_start": "vision_bos", "audio_start": "audio_bos"}
    config = SimpleNamespace(
        **{f"{name}_token_id": IDS[name] for name in NAMES[:3]},
        **{f"{name}_token_id": IDS[own] for name, own in names.items()},
        position_id_per_seconds=25,
        seconds_per_chunk=2,
        audio_config=SimpleNamespace(n_window=50),
    )
    model = SimpleNamespace(config=config, spatial_merge_size=2)
    for name in ("get_llm_pos_ids_for_vision", "get_chunked_index"):
        if hasattr(thinker, name):
            setattr(model, name, getattr(thinker, name).__get__(model))
    positions, _ = thinker.get_rope_index(
        model,
        torch.tensor([ids]),
        video_grid_thw=torch.tensor([grid]),
        attention_mask=torch.ones(1, len(ids)),
        use_audio_in_video=True,
        audio_seqlens=torch.tensor([frames]),
        second_per_grids=torch.tensor([seconds]),
    )
    return positions[:, 0]


@pytest.mark.parametrize("version", STOCK)
def test_order_and_positions_are_stocks(version: str) -> None:
    """Also where sound is much shorter or longer, and pictures are further apart than a chunk."""
    rng = np.random.default_rng(0)
    for number in range(80):
        grid = (int(rng.integers(1, 9)), *(2 * int(n) for n in rng.integers(1, 6, 2)))
        seconds = float(rng.choice([1, 2, 2 / 3, 2 / 7, 5]))
        frames = int(rng.integers(2, 1200)) if number % 3 else int(100 * seconds * grid[0])
        heard = audio_tokens(frames, None if version == "2.5" else 100)
        times = np.arange(grid[0], dtype=np.float32) * np.float32(seconds) * np.float32(25)
        exact = np.arange(grid[0]) * seconds * 25
        if fractional := version == "3":
            order = sound_order(exact.tolist(), grid[1] * grid[2] // 4, heard, 0)
        else:
            times = times.astype(np.int64)
            order = sound_order(times.tolist(), grid[1] * grid[2] // 4, heard, 50)
        wanted = stock_ids(version, grid, heard, seconds)
        found = [0, IDS["vision_bos"], IDS["audio_bos"]]
        for kind, count in order.pieces:
            found += [IDS[kind]] * count
        found += [IDS["audio_eos"], IDS["vision_eos"], 0, 0]
        assert found == wanted, (grid, heard, seconds)
        is_seen, grids = np.array(found) == IDS["video"], np.array([grid])
        settings = {"sounds": [order], "fractional": fractional}
        positions = mrope_positions(is_seen, grids, 2, [times.tolist()], **settings)
        expected = stock_positions(version, found, grid, frames, seconds).numpy()
        assert np.allclose(positions, expected, rtol=2e-6, atol=0), (grid, heard, seconds)


def record(*parts: dict[str, Any]) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": "A boat."},
        ]
    }


@pytest.fixture
def shards(tmp_path: Path) -> Shards:
    """Of a video with sound, which is heard and is not; of one without; of one with two others."""
    files = {"a.mp4": clip(48, heard=1.7), "b.mkv": clip(30, kind="matroska"), "c.wav": sound(0.5)}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    heard = {"type": "video", "video": "a.mp4", "sound": True}
    silent = {"type": "video_url", "video_url": {"url": "b.mkv"}, "sound": True}
    records = [
        record(heard),
        record({"type": "video", "video": "a.mp4"}),
        record(silent),
        record({"type": "audio", "audio": "c.wav"}, heard, silent),
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, records)))
    report = write_shards(tmp_path / "chats.jsonl", tmp_path / "shards")
    assert (report.num_videos, report.num_audios) == (5, 3)
    checked = check_records(tmp_path / "chats.jsonl")
    assert (checked.num_videos, checked.num_audios) == (5, 3)
    return Shards.open([tmp_path / "shards"])


@pytest.mark.parametrize("version", STOCK)
def test_what_is_measured_is_what_is_encoded(shards: Shards, version: str) -> None:
    """A video without sound is silent, whatever its part says; so is any by the configuration."""
    small = VideoConfig(frame_pixels=(1024, 4096))
    processor = Processor.from_directory(FOLDERS[version], video=small)
    deaf = small.model_copy(update={"sound": False})
    silent = Processor.from_directory(FOLDERS[version], video=deaf)
    assert silent.fingerprint != processor.fingerprint
    frames = []
    for each in (processor, silent):
        for number in range(4):
            raw = shards.read(number)
            encoded, measured = each.encode(raw), each.measure(raw.json, shards.media_of(number))
            assert measured.num_tokens == len(encoded.input_ids)
            assert measured.audio_frames == int(encoded.audio_lengths.sum())
            assert measured.num_patches == int(encoded.image_grid_thw.prod(1).sum())
            frames.append(measured.audio_frames)
    assert frames[:4] == [frames[0], 0, 0, frames[0] + frames[7]] and frames[0] >= 170
    assert frames[4:] == [0, 0, 0, frames[7]] and frames[7] >= 49
    with_sound, without = (processor.encode(shards.read(number)) for number in (0, 1))
    heard = len(with_sound.audio_positions) + 2  # and the two around them
    assert len(with_sound.input_ids) == len(without.input_ids) + heard
    assert torch.equal(with_sound.pixel_values, without.pixel_values)


def test_all_videos_may_be_heard(shards: Shards, tmp_path: Path) -> None:
    """But of those whose parts say that they are not."""
    messages = record()["messages"]
    messages[0]["content"] = "<video>What?"
    lines = [
        {"messages": messages, "videos": ["a.mp4"]},
        record({"type": "video", "video": "a.mp4", "sound": False}),
    ]
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, lines)))
    write_shards(tmp_path / "all.jsonl", tmp_path / "all", hear_videos=True)
    heard = Shards.open([tmp_path / "all"])
    assert [len(heard.media_of(number).kind) for number in range(2)] == [2, 1]
    assert heard.media_of(0).seconds.tolist() == shards.media_of(0).seconds.tolist()


def test_an_index_made_of_a_tar_is_the_writers(shards: Shards) -> None:
    (path,) = shards.paths
    assert build_index(path).fingerprint == shards.indexes[0].fingerprint
    rows = [len(shards.media_of(number).kind) for number in range(4)]
    assert rows == [2, 1, 2, 5]
    assert shards.media_of(0).seconds[1] == probe_sound(clip(48, heard=1.7))
    assert shards.media_of(2).seconds[1] == 0


def test_what_cannot_be_heard_is_refused(shards: Shards, tmp_path: Path) -> None:
    raw = shards.read(0)
    blind = Processor.from_directory(MODEL)  # a Qwen3-VL
    for number in (0, 2):  # also one without sound, or the plan would hold what is then refused
        told = shards.read(number)
        with pytest.raises(ValueError, match=r"must hear videos, .* set data\.video\.sound=false"):
            blind.encode(told)
        with pytest.raises(ValueError, match=r"must hear videos, .* set data\.video\.sound=false"):
            blind.measure(told.json, shards.media_of(number))
    assert Processor.from_directory(MODEL, video=VideoConfig(sound=False)).encode(raw)
    omni = Processor.from_directory(FOLDERS["2.5"])
    with pytest.raises(ValueError, match=r"must have 2 rows of media, .* got 1; run: "):
        omni.measure(raw.json, shards.media_of(1))
    (tmp_path / "bad.jsonl").write_text(
        json.dumps(record({"type": "video", "video": "a.mp4", "sound": 1}))
    )
    with pytest.raises(ValueError, match=r"content\[0\]\.sound must be true or false, got 1"):
        write_shards(tmp_path / "bad.jsonl", tmp_path / "no")
    rules = read_audio_rules(FOLDERS["2.5"])
    assert rules is not None
    long = RawSample("k", "x", shards.read(0).json, [clip(24, heard=rules.max_seconds + 1)])
    with pytest.raises(ValueError, match=r"audio must be at most .* split it"):
        omni.encode(long)
