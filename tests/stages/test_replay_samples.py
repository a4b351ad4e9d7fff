"""`--replay` of stages whose batches are samples: the step's loss again, and whose it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from tests.models.tiny_rae import configs
from tests.ranks import run_ranks
from tests.stages import test_diffusion, test_rae
from tests.tiny import make_shards
from triptych_core.config import load_config
from triptych_data.tensors.write import write_tensor_shards

STAGES = {"diffusion": (test_diffusion, "DiffusionConfig"), "rae": (test_rae, "RaeConfig")}
ODD = 5  # a sample far from all others


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("replay")
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(12, *test_diffusion.SHAPE, generator=generator)
    rows[ODD] *= 30
    samples = [({"label": i % 3}, {"latents": row}) for i, row in enumerate(rows)]
    write_tensor_shards(samples, path / "diffusion/train")
    configs(path / "rae/nets")
    make_shards(path / "rae/train", 12)
    return path


def words_for(name: str, workspace: Path, *more: str) -> list[str]:
    tests, folder = STAGES[name][0], workspace / name
    return [
        *tests.words(folder, folder / "run", "evaluation.shards=[]", "data.batch_size=3"),
        *("run.steps=4", "export=false", "samples.count=1", *more),
    ]


def replays(name: str, words: list[str], steps: list[int]) -> None:
    tests, kind = STAGES[name]
    stage = tests.stage()
    import replaying
    import replaying_samples
    from running import begin_samples

    for step in steps:
        config = load_config(getattr(stage, kind), None, [*words, f"replay.step={step}"])
        config, runtime, _ = begin_samples(config, stage.plan)
        batches = replaying_samples.kind_of(stage.build_job, stage._loop)
        replaying.replay_step(config, runtime, batches)


def replayed(run_dir: Path, step: int) -> dict[str, Any]:
    return json.loads((run_dir / f"replay/step-{step:06d}.json").read_text())


@pytest.mark.parametrize("name", STAGES)
def test_a_step_is_run_again_to_the_last_bit(workspace: Path, name: str, capfd):
    """From the begin, from a checkpoint, and on one rank, which takes the batches of both."""
    words, run_dir = words_for(name, workspace), workspace / name / "run"
    run_ranks(STAGES[name][0].train, 2, words)
    lines = {line["step"]: line for line in map(json.loads, (run_dir / "metrics.jsonl").open())}
    steps = [1, 2, 4] if name == "diffusion" else [4]
    run_ranks(replays, 2, name, words, steps)
    for step in steps:
        found = replayed(run_dir, step)
        assert found["is_exact"] and (found["forward"], found["backward"]) == ({}, {})
        for key in ("loss", "grad_norm"):
            assert found[key] == lines[step][key]
        norms = sum(norm**2 for norm in found["modules"].values()) ** 0.5
        assert norms == pytest.approx(found["grad_norm"], rel=1e-5)
        targets = sum(sample["targets"] for sample in found["samples"])
        summed = sum(sample["loss"] * sample["targets"] for sample in found["samples"])
        assert targets == lines[step]["num_targets"] and len(found["samples"]) == 6
        assert summed / targets == pytest.approx(found["loss"], rel=1e-5)
    assert capfd.readouterr().out.count("to the last bit as on record") == 2 * len(steps)
    of_two = replayed(run_dir, 4)
    run_ranks(replays, 1, name, words, [4])
    of_one = replayed(run_dir, 4)
    assert of_one["is_exact"] and of_one["loss"] == of_two["loss"]
    assert of_one["samples"] == of_two["samples"]
    assert not (run_dir / "replay/unfinished").exists()
    if name == "diffusion":  # two steps are an epoch
        worst = [replayed(run_dir, step)["samples"][0]["key"] for step in (1, 2)]
        assert f"{ODD:09d}" in worst
