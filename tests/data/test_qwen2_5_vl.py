"""Qwen2.5-VL's images: the patches and tokens of stock, its positions, the logits it computes."""

import json
import shutil
from pathlib import Path

from tests.data.against_stock import packed_as_alone
from tests.data.packs import MODEL
from tests.models import tiny

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
