"""Qwen2.5-VL's images: the patches and tokens of stock, its positions, the logits it computes.

Of its videos the frames, sizes and positions; tests/models/test_video.py goes on to gradients.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLModel, Qwen2VLVideoProcessor
from transformers.video_utils import VideoMetadata

from tests.data.against_stock import packed_as_alone
from tests.data.packs import MODEL
from tests.models import tiny
from triptych_data.media.config import VideoConfig
from triptych_data.media.positions import mrope_positions
from triptych_data.media.rules import read_video_rules
from triptych_data.media.video import video_layout

PATCH = 14  # bytes of a row of a patch that no word divides, as in the published models


def write_folder(path: Path) -> Path:
    """A folder as the hub has them: bounds on pixels on top, no file for videos."""
    path.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(MODEL / name, path / name)
    tokenizer = json.loads((MODEL / "tokenizer_config.json").read_text())
    tokenizer["processor_class"] = "Qwen2_5_VLProcessor"
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = json.loads((MODEL / "config.json").read_text())
    tiny.write_qwen2_5_vl_model_dir(path, vocab_size=512, **{name: ids[name] for name in names})
    config = json.loads((path / "config.json").read_text())
    config["vision_config"] |= {"patch_size": PATCH, "window_size": 4 * PATCH}
    (path / "config.json").write_text(json.dumps(config))
    images = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "min_pixels": (2 * PATCH) ** 2,
        "max_pixels": 40 * (2 * PATCH) ** 2,
        "patch_size": PATCH,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "image_mean": [0.48, 0.46, 0.41],
        "image_std": [0.27, 0.26, 0.28],
    }
    (path / "preprocessor_config.json").write_text(json.dumps(images))
    return path


def test_tokens_and_logits_of_packed_samples_are_stocks_one_by_one(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model")
    batch = packed_as_alone(folder, [[], [(28, 56)], [(140, 84), (30, 64)], [(100, 20)]])
    # Windows of 2 x 2 tokens: of an image of 3 x 5, six, some of them cut off at the edge.
    assert batch["image_grid_thw"].tolist()[1] == [1, 6, 10]


@pytest.mark.parametrize("capped", [False, True])
def test_layouts_and_positions_of_any_video_are_stocks(tmp_path: Path, capped: bool) -> None:
    """Capped by a folder without a file for videos, which has the bounds of Qwen's own code."""
    folder = write_folder(tmp_path / "model")
    stock = Qwen2VLVideoProcessor(do_sample_frames=True, fps=2, cap_pixels_per_frame=capped)
    if not capped:
        settings = json.loads(stock.to_json_string())
        (folder / "video_preprocessor_config.json").write_text(json.dumps(settings))
    rules = read_video_rules(folder, VideoConfig())
    assert rules is not None and rules.tokens_per_second == 2
    vision = SimpleNamespace(spatial_merge_size=2, tokens_per_second=2)
    model = SimpleNamespace(config=SimpleNamespace(vision_config=vision))
    model.get_vision_position_ids = Qwen2_5_VLModel.get_vision_position_ids.__get__(model)
    rng, shrunk, late = np.random.default_rng(0), 0, 0
    for number in range(200):
        count, width, height = (int(x) for x in rng.integers((2, 40, 40), (30_000, 1400, 1400)))
        count = count if number % 2 else count % 300 + 2
        rate = float(rng.choice([1, 12.5, 24, 25, 30, 30000 / 1001, 60]))
        metadata = VideoMetadata(total_num_frames=count, fps=rate)
        metadata.frames_indices = frames = stock.sample_frames(metadata, fps=2)
        layout = video_layout(width, height, count, count / rate, rules)
        assert layout.frames.tolist() == frames.tolist()
        nothing = torch.empty(1, len(frames), 3, height, width, device="meta")
        settings = {"cap_pixels_per_frame": capped, "temporal_factor": 2, "resample": 3}
        resized = stock.resize(nothing, stock.size, factor=2 * PATCH, **settings)
        grid = (len(frames) // 2, *(side // PATCH for side in resized.shape[-2:]))
        assert layout.grid == grid
        free = video_layout(width, height, count, count / rate, rules._replace(total_pixels=None))
        shrunk += layout.grid != free.grid
        if np.prod(grid) > 40_000:
            continue
        is_video = torch.tensor([0] * 3 + [1] * (np.prod(grid) // 4) + [0] * 2)
        seconds = torch.tensor([2 / metadata.sampled_fps])
        expected, _ = Qwen2_5_VLModel.get_rope_index(
            model,
            is_video[None],
            mm_token_type_ids=2 * is_video[None],
            video_grid_thw=torch.tensor([grid]),
            second_per_grid_ts=seconds,
        )
        # Text goes on after all of the video, as up to transformers 5.2 and in stock's generation.
        last = expected[:, 0, :-2].max().item()
        late += last >= expected[0, 0, -2].item()
        expected[:, 0, -2:] = torch.tensor([last + 1, last + 2])
        grids = np.array([grid])
        found = mrope_positions(is_video.numpy() == 1, grids, 2, [layout.times])
        assert found.tolist() == expected[:, 0].tolist()
    assert (shrunk > 40) == capped
    assert late


def test_all_frames_share_the_pixels_that_are_asked_for(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model")
    rules = read_video_rules(folder, VideoConfig(max_pixels=60 * 200_000, max_frames=60, fps=1))
    assert rules is not None
    layout = video_layout(1280, 720, 3000, 100, rules)
    assert len(layout.frames) == 60 and layout.frames[1] == 50
    assert 0.9 < layout.grid[1] * layout.grid[2] * PATCH**2 / 200_000 <= 1
    assert layout.times == tuple(int(2 * 100 / 30 * n) for n in range(30))
    one = video_layout(640, 480, 1, 0.04, rules)  # two frames a patch: the one twice
    assert one.frames.tolist() == [0, 0] and one.grid[0] == 1
