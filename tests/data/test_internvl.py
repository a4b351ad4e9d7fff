"""InternVL's images: the squares that stock cuts, the tokens it writes, the logits it computes."""

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer
from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

from tests.data.against_stock import packed_as_alone
from tests.data.model_folders import model_folder
from tests.models import tiny
from triptych_data.media.images import ImageRules, tile_grid

SIDE, TOKENS = 16, 4
MEAN, STD = [0.48, 0.45, 0.4], [0.26, 0.27, 0.28]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for c in m.content %}{% if c.type == 'image' %}<IMG_CONTEXT>\n"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NAMES = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the hub has them, of a tiny InternVL."""
    path = tmp_path_factory.mktemp("internvl")
    model_folder(path, TEMPLATE, [*NAMES.values()], extra_special_tokens=NAMES)
    ids = AutoTokenizer.from_pretrained(path).get_vocab()
    tiny.write_internvl_model_dir(path, image_token_id=ids["<IMG_CONTEXT>"])
    config = json.loads((path / "config.json").read_text())
    config["text_config"]["vocab_size"] = 600
    (path / "config.json").write_text(json.dumps(config))
    images = {
        "image_processor_type": "GotOcr2ImageProcessorFast",
        "processor_class": "InternVLProcessor",
        "size": {"height": SIDE, "width": SIDE},
        "image_mean": MEAN,
        "image_std": STD,
        "max_patches": 6,
    }
    (path / "preprocessor_config.json").write_text(json.dumps(images))
    videos = {"video_processor_type": "InternVLVideoProcessor", "size": images["size"]}
    (path / "video_preprocessor_config.json").write_text(json.dumps(videos))
    processor = {"processor_class": "InternVLProcessor", "image_seq_length": TOKENS}
    (path / "processor_config.json").write_text(json.dumps(processor))
    return path


def test_shapes_of_tiles_are_stocks_for_any_size() -> None:
    rng = np.random.default_rng(0)
    for fewest, most in ((1, 12), (1, 1), (2, 5)):
        rules = ImageRules(4, 1, 1, SIDE**2, SIDE**2, SIDE, tiles=(fewest, most))
        for width, height in rng.integers(1, 90, (700, 2)).tolist():
            cols, rows = get_optimal_tiled_canvas((height, width), (SIDE, SIDE), fewest, most)
            assert tile_grid(width, height, rules) == (rows, cols)


def test_tokens_and_logits_of_packed_samples_are_stocks_one_by_one(folder: Path) -> None:
    batch = packed_as_alone(folder, [[], [(16, 16)], [(40, 16), (30, 64)], [(100, 20)]])
    # One; three and a whole one, two and a whole one; five and a whole one.
    assert len(batch["image_grid_thw"]) == 1 + (3 + 1) + (2 + 1) + (5 + 1)
