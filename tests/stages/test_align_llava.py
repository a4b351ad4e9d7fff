"""The shipped tiny LLaVA goes through alignment, with rows whole or shared, and is planned."""

from __future__ import annotations

import deepspeed  # noqa: F401  once, and not on every rank
import pytest
import torch
from safetensors.torch import load_file

from tests.ranks import run_ranks
from tests.stages.test_align import align_stage, build_from
from tests.stages.test_sft import metrics
from tests.tiny import ROOT, make_shards
from triptych_core.config import load_config

SHIPPED = ROOT / "stages/configs/align_llava_tiny.yaml"
FOLDER = ROOT / "stages/configs/llava_tiny"


def align(words: list[str]) -> None:
    stage = align_stage()
    stage.main(load_config(stage.AlignConfig, SHIPPED, words))


def plan(words: list[str]) -> int:
    stage = align_stage()
    return int(stage.plan(load_config(stage.AlignConfig, SHIPPED, words)).parameters)


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    path = tmp_path_factory.mktemp("align-llava")
    make_shards(path / "train", 12, seed=1)
    return [
        *("run.device=cpu", "run.steps=2", "schedule.warmup_steps=1", f"model.path={FOLDER}"),
        *(f"data.shards=[{path / 'train/shards'}]", "data.num_workers=0", "data.seq_len=256"),
        *("checkpoint.save=false", "engine.gradient_accumulation_steps=2"),
    ]


def test_the_projector_trains_and_rows_may_be_shared(words, tmp_path):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    run_ranks(align, 1, [*words, f"run.dir={alone}"])
    run_ranks(align, 2, [*words, f"run.dir={shared}", "parallel.sequence=2"])
    for ours, theirs in zip(metrics(shared), metrics(alone), strict=True):
        for name in ("loss", "grad_norm", "num_targets", "flops"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    before, after = build_from(FOLDER), load_file(alone / "export/model.safetensors")
    assert before.keys() == after.keys()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if "multi_modal_projector" in name}
    other = load_file(shared / "export/model.safetensors")
    for name in moved:
        torch.testing.assert_close(other[name], after[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_plan_knows_its_parameters(words, tmp_path, ranks):
    more = [f"run.dir={tmp_path}", f"plan.ranks={ranks}", f"parallel.sequence={ranks}"]
    # Not here: after a backward on fake tensors one cannot fork.
    (found,) = run_ranks(plan, 1, [*words, *more])
    assert found == sum(value.numel() for value in build_from(FOLDER).values())
