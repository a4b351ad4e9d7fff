"""Weights cut over ranks by DeepSpeed's AutoTP: a stage's run equals that of one rank.

That every gradient does is in test_combinations.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401  once, and not on every rank
import pytest
import torch
from safetensors.torch import load_file

from tests.models import tiny
from tests.ranks import run_ranks
from tests.stages.test_sft import metrics, overrides, run_stage
from tests.tiny import make_model_dir, make_shards

FIGURES = ("loss", "grad_norm", "num_targets", "num_tokens", "flops", "packing_fill")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """Shards, a model with two key heads, and the run of one rank."""
    path = tmp_path_factory.mktemp("tensor")
    file = make_model_dir(path / "model") / "config.json"
    config = json.loads(file.read_text())
    config["text_config"]["num_key_value_heads"] = 2
    file.write_text(json.dumps(config))
    make_shards(path / "train", 14, seed=1)
    make_shards(path / "heldout", 3, seed=2)
    run_ranks(run_stage, 1, words(path, "one", 3, "checkpoint.save=false"))
    return path


def words(path: Path, run: str, steps: int, *settings: str) -> list[str]:
    return overrides(
        path,
        path / run,
        *(f"run.steps={steps}", "optim.lr=1e-3", "optim.eps=1e-3", "schedule.kind=constant"),
        *("export=true", "engine.precision=fp32", "checkpoint.keep=9", *settings),
    )


def exported(path: Path, run: str) -> dict[str, torch.Tensor]:
    return load_file(path / run / "export/model.safetensors")


def test_the_stage_runs_as_on_one_rank_and_goes_on_from_its_checkpoint(workspace):
    from triptych_data.plan.ledger import audit

    cut = ["parallel.tensor=2", "engine.zero.stage=1", "engine.checkpointing=full"]
    run_ranks(run_stage, 2, words(workspace, "two", 2, *cut))
    with pytest.raises(RuntimeError, match=r"parallel\.tensor must be 1 as in this run, got 2"):
        run_ranks(run_stage, 2, words(workspace, "two", 3, "engine.zero.stage=1"))
    # Under another stage; the parts of weights are the same.
    cut[1] = "engine.zero.stage=3"
    run_ranks(run_stage, 2, words(workspace, "two", 3, *cut))
    for alone, shared in zip(metrics(workspace / "one"), metrics(workspace / "two"), strict=True):
        for name in FIGURES:
            assert shared[name] == pytest.approx(alone[name], rel=1e-4), name
    found, wanted = exported(workspace, "two"), exported(workspace, "one")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name] - tensor).norm() <= 1e-5 * tensor.norm() + 1e-6, name
    alone, shared = (
        [json.loads(line) for line in (workspace / run / "evaluation.jsonl").open()]
        for run in ("one", "two")
    )
    assert shared[-1]["counts"] == alone[-1]["counts"]
    assert shared[-1]["heldout_loss"] == pytest.approx(alone[-1]["heldout_loss"], rel=1e-4)
    assert [e["answer"] for e in shared[-1]["examples"]] == [
        e["answer"] for e in alone[-1]["examples"]
    ]
    facts = [json.loads((workspace / run / "run.json").read_text()) for run in ("one", "two")]
    assert facts[0]["parameters"] == facts[1]["parameters"]
    assert audit(workspace / "two/ledger").samples == audit(workspace / "one/ledger").samples


@pytest.mark.parametrize(
    ("settings", "world_size", "message"),
    [
        (["parallel.tensor=3"], 2, r"parallel\.tensor: must divide the number of ranks \(2\)"),
        (["parallel.tensor=3"], 3, r"parallel\.tensor: must divide the model's num_attention_head"),
        (["parallel.tensor=2", "parallel.sequence=2"], 4, r"times parallel\.sequence \(2\) must"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_the_reason(workspace, settings, world_size, message):
    run = words(workspace, "refused", 1, "engine.zero.stage=1", *settings)
    with pytest.raises(RuntimeError, match=message):
        run_ranks(run_stage, world_size, run)


def cut_by_other_names(folder: Path, change: dict[str, Any]) -> None:
    from triptych_core.config import RunConfig, StageConfig, load_config
    from triptych_core.engine.build import build_engine
    from triptych_core.launch import launch
    from triptych_core.optim.groups import build_optimizer, parameter_groups
    from triptych_core.parallel.tensor import TensorCuts
    from triptych_models.config import ModelConfig
    from triptych_models.families import build_model
    from triptych_models.tensor import tensor_cuts

    runtime = launch(RunConfig(device="cpu"))
    config = load_config(StageConfig, None, ["engine.precision=fp32", "engine.zero.stage=1"])
    model = build_model(ModelConfig(path=folder, init="random"), dtype=torch.float32)
    groups = parameter_groups(model.named_parameters(), config.optim, lambda name: "all")
    cuts = TensorCuts(2, tensor_cuts(model, 2) | change)
    optimizer = build_optimizer(groups, config.optim)
    build_engine(model, optimizer, config.engine, config.optim, runtime.world_size, (), cuts)


def test_weights_that_deepspeed_leaves_whole_are_an_error(tmp_path):
    folder = tiny.write_text_model_dir(tmp_path / "model", tied=True)
    # A weight that AutoTP does not know how to cut: it says nothing.
    change = {"hf.model.norm.weight": "outputs"}
    with pytest.raises(RuntimeError, match=r"must cut 15 weights, got 14 .* hf\.model\.norm\.weig"):
        run_ranks(cut_by_other_names, 2, folder, change)
