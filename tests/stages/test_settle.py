"""`auto`: the lowest stage that fits, said in the run's opening lines; a resume plans anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.ranks import run_ranks
from tests.tiny import make_model_dir, make_shards, sft_stage


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("settle")
    make_model_dir(path / "model")
    # Deep enough that the two layers ZeRO-3 gathers at a time are little of the model.
    config = json.loads((path / "model/config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 7
    (path / "model/config.json").write_text(json.dumps(config))
    make_shards(path / "train", 20, seed=1)
    return path


def words(workspace: Path, name: str, *more: str) -> list[str]:
    return [
        f"run.dir={workspace / name}",
        "run.steps=2",
        "run.device=cpu",
        f"model.path={workspace / 'model'}",
        "model.init=random",
        f"data.shards=[{workspace / 'train/shards'}]",
        "data.seq_len=256",
        "data.num_workers=0",
        "engine.precision=bf16",
        "engine.zero.stage=auto",
        "engine.checkpointing=full",
        "engine.gradient_accumulation_steps=2",
        "engine.zero.bucket_size=1000",
        "engine.zero.persistence_threshold=0",
        "engine.zero.max_live=20000",
        "plan.headroom=0",
        "export=false",
        *more,
    ]


def run_stage(arguments: list[str]) -> None:
    from triptych_core.config import load_config

    sft = sft_stage()
    sft.main(load_config(sft.SftConfig, None, arguments))


def make_plan(arguments: list[str]) -> Any:
    from triptych_core.config import load_config

    sft = sft_stage()
    return sft.plan(load_config(sft.SftConfig, None, arguments))


def planned(arguments: list[str]) -> Any:
    """In a process of its own: after a backward on fake tensors this one could not fork."""
    return run_ranks(make_plan, 1, arguments)[0]


@pytest.fixture(scope="module")
def peaks(workspace) -> dict[tuple[int, str], float]:
    """GiB on two ranks, by stage and checkpointing."""
    plan = planned(words(workspace, "none", "plan.ranks=2", "plan.show=table"))
    return {(c.stage, c.checkpointing): c.memory.peak / 2**30 for c in plan.choices}


def test_the_lowest_stage_that_fits_is_taken_and_said(workspace, peaks, capfd):
    lower = min(peaks[1, "full"], peaks[2, "full"])
    assert peaks[3, "full"] < lower
    for name, memory, stage in (
        ("large", 1.0, 0),
        ("small", (lower + peaks[3, "full"]) / 2, 3),
    ):
        run_ranks(run_stage, 2, words(workspace, name, f"plan.gpu_memory_gib={memory:.9f}"))
        config = yaml.safe_load((workspace / name / "config.yaml").read_text())
        assert config["engine"]["zero"]["stage"] == stage
        said = json.loads((workspace / name / "run.json").read_text())["chosen"]
        assert said.startswith(f"ZeRO-{stage}, full checkpointing")
        assert f"chosen by the plan: {said}" in capfd.readouterr().out
    # On a larger device the run goes on under a lower stage, from the same files.
    more = ["run.steps=3", "plan.gpu_memory_gib=1"]
    run_ranks(run_stage, 2, words(workspace, "small", *more))
    config = yaml.safe_load((workspace / "small/config.yaml").read_text())
    assert config["engine"]["zero"]["stage"] == 0
    assert len((workspace / "small/metrics.jsonl").read_text().splitlines()) == 3


def test_checkpointing_is_chosen_with_the_stage(workspace, peaks):
    more = ["plan.ranks=2", "engine.checkpointing=auto", "engine.zero.stage=1"]
    for memory, way in (
        (1.0, "none"),
        ((peaks[1, "none"] + peaks[1, "selective"]) / 2, "selective"),
        ((peaks[1, "selective"] + peaks[1, "full"]) / 2, "full"),
    ):
        arguments = words(workspace, "no", *more, f"plan.gpu_memory_gib={memory:.9f}")
        plan = planned(arguments)
        assert plan.chosen is not None
        assert (plan.chosen.stage, plan.chosen.checkpointing) == (1, way)


def test_what_is_forbidden_is_not_chosen(workspace):
    """Offloaded states need a stage, MLPs in chunks keep no products."""
    forbidding = ["engine.zero.offload_optimizer=true", "engine.mlp_chunks=2"]
    more = [*forbidding, "engine.checkpointing=auto", "plan.gpu_memory_gib=0.0001"]
    plan = planned(words(workspace, "no", *more))
    assert {c.stage for c in plan.choices} == {1, 2, 3}
    assert {c.checkpointing for c in plan.choices} == {"none", "full", "offload"}
    assert plan.chosen is None and "nothing fits" in plan.why()
