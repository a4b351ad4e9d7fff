"""Rows with sound through the whole engine: divided weights give the step of one rank that has all.

On two ranks one has text while the other has recordings alone, then one has all media and the other
nothing but padding.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import deepspeed  # noqa: F401  once, and not on every rank
import pytest

from tests.models import tiny_audio
from tests.ranks import run_ranks
from tests.stages.one_step import compare, on_a_rank

STAGES = (0, 1, 2, 3)


WRITERS = (
    tiny_audio.write_aero_model_dir,
    tiny_audio.write_qwen2_5_omni_model_dir,
    tiny_audio.write_qwen3_omni_model_dir,
)


def words(stage: int, ranks: int, *more: str) -> list[str]:
    steps = 4 // ranks
    return [f"engine.zero.stage={stage}", f"engine.gradient_accumulation_steps={steps}", *more]


@pytest.mark.parametrize("write", WRITERS)
def test_two_ranks_are_one(write: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    (wanted,) = run_ranks(on_a_rank, 1, folder, folder.parent / "one", [words(0, 1)])[0]
    layouts = [words(stage, 2) for stage in STAGES]
    layouts.append(words(3, 2, "engine.checkpointing=full"))
    gradients = wanted.gradients.items()
    assert all(x.tensor.any() for name, x in gradients if "tower" in name and "conv" in name)
    for rank, found in enumerate(run_ranks(on_a_rank, 2, folder, folder.parent / "two", layouts)):
        for layout, step in zip(layouts, found, strict=True):
            compare(step, wanted, f"rank {rank} of {layout}")
