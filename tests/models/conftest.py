from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.models import tiny
from triptych_models.config import ModelConfig
from triptych_models.families import build_model
from triptych_models.qwen3_vl import Qwen3VL

Build = Callable[..., Qwen3VL]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """build(tied=…, dtype=…, **ModelConfig fields): a tiny model, random unless path is given."""

    def build_tiny(*, tied: bool = False, dtype: torch.dtype = torch.float32, **fields) -> Qwen3VL:
        if "path" not in fields:
            fields["path"] = tiny.write_model_dir(tmp_path / f"tiny-{tied}", tied=tied)
            fields.setdefault("init", "random")
        return build_model(ModelConfig(**fields), dtype=dtype)

    return build_tiny


@pytest.fixture
def documents() -> list[tiny.Document]:
    """Text, one image, two images of other shapes, text: 4 documents, 74 tokens."""
    return [
        tiny.document(1, words=9),
        tiny.document(2, words=5, grids=[(1, 4, 6)]),
        tiny.document(3, words=4, grids=[(1, 8, 2), (1, 2, 2)]),
        tiny.document(4, words=11),
    ]
