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
    config = json.loads((make_model_dir(path / "deep") / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 7
    (path / "deep/config.json").write_text(json.dumps(config))
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


def settle_without_a_plan(arguments: list[str]) -> str:
    from triptych_core.config import RunConfig, load_config
    from triptych_core.launch import launch
    from triptych_core.plan.settle import settle

    def plan(config: Any) -> Any:
        raise ValueError("model.path: must be a model")

    launch(RunConfig(device="cpu"))
    config = load_config(sft_stage().SftConfig, None, arguments)
    with pytest.raises(ValueError, match="must be a model") as error:
        settle(config, plan)
    return str(error.value)


def test_what_cannot_be_planned_ends_every_rank(workspace):
    """Of which only the first plans: the others would wait for what it chose."""
    arguments = words(workspace, "unplanned")
    assert len({*run_ranks(settle_without_a_plan, 2, arguments, timeout=30)}) == 1


def test_the_lowest_stage_that_fits_is_taken_and_said(workspace, capfd):
    deep = f"model.path={workspace / 'deep'}"
    plan = planned(words(workspace, "none", deep, "plan.ranks=2", "plan.gpu_memory_gib=1"))
    peaks = {choice.stage: choice.memory.peak / 2**30 for choice in plan.choices}
    assert plan.chosen is not None and plan.chosen.stage == 0
    lower = min(peaks[1], peaks[2])
    assert peaks[3] < lower
    # On a larger device the run goes on under a lower stage, from the same files.
    for memory, stage, steps in (((lower + peaks[3]) / 2, 3, 2), (1.0, 0, 3)):
        more = [deep, f"run.steps={steps}", f"plan.gpu_memory_gib={memory:.9f}"]
        run_ranks(run_stage, 2, words(workspace, "run", *more))
        config = yaml.safe_load((workspace / "run/config.yaml").read_text())
        assert config["engine"]["zero"]["stage"] == stage
        chosen = f"ZeRO-{stage}, full checkpointing"
        assert f"chosen by the plan: {chosen}" in capfd.readouterr().out
        if stage == 3:
            said = json.loads((workspace / "run/run.json").read_text())["chosen"]
            assert said.startswith(chosen)
    assert len((workspace / "run/metrics.jsonl").read_text().splitlines()) == 3


def test_checkpointing_is_chosen_with_the_stage(workspace):
    more = ["plan.ranks=2", "engine.checkpointing=auto", "engine.zero.stage=1"]
    arguments = words(workspace, "no", *more)
    plan = planned([*arguments, "plan.gpu_memory_gib=1"])
    peaks = {choice.checkpointing: choice.memory.peak / 2**30 for choice in plan.choices}
    assert plan.chosen is not None and plan.chosen.checkpointing == "none"
    for memory, way in (
        ((peaks["none"] + peaks["selective"]) / 2, "selective"),
        ((peaks["selective"] + peaks["full"]) / 2, "full"),
    ):
        plan = planned([*arguments, f"plan.gpu_memory_gib={memory:.9f}"])
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
