"""Rows with sound through the whole engine: divided weights give the step of one rank that has all.

On two ranks one has text while the other has recordings alone, then one has all media and the other
nothing but padding.
"""

from __future__ import annotations

from pathlib import Path

import deepspeed  # noqa: F401  once, and not on every rank
import pytest

from tests.models import tiny_audio
from tests.ranks import run_ranks
from tests.stages.one_step import compare, on_a_rank

STAGES = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_audio.write_qwen2_5_omni_model_dir(tmp_path_factory.mktemp("omni") / "model")


def words(stage: int, ranks: int, *more: str) -> list[str]:
    steps = 4 // ranks
    return [f"engine.zero.stage={stage}", f"engine.gradient_accumulation_steps={steps}", *more]


def test_two_ranks_are_one(folder: Path) -> None:
    (wanted,) = run_ranks(on_a_rank, 1, folder, folder.parent / "one", [words(0, 1)])[0]
    layouts = [words(stage, 2) for stage in STAGES]
    layouts.append(words(3, 2, "engine.checkpointing=full"))
    assert wanted.gradients["hf.model.audio_tower.conv1.weight"].tensor.any()
    for rank, found in enumerate(run_ranks(on_a_rank, 2, folder, folder.parent / "two", layouts)):
        for layout, step in zip(layouts, found, strict=True):
            compare(step, wanted, f"rank {rank} of {layout}")
