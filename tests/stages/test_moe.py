"""The stage for mixtures of experts, whole: with experts divided over ranks it ends like one rank.

Also from a checkpoint that was saved with them divided otherwise, with frozen experts, with Muon.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import deepspeed  # noqa: F401  once, and not on every rank
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.ranks import run_ranks
from tests.stages.test_pretrain import make_documents, make_text_model_dir, metrics, overrides
from tests.tiny import ROOT
from tests.tools.average_folders import assert_same, average, read
from triptych_core.averaging.sources import open_source


def moe_stage() -> ModuleType:
    sys.path.insert(0, str(ROOT / "stages"))
    import moe

    return moe


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("moe-stage")
    make_text_model_dir(path / "model")
    config = json.loads((path / "model/config.json").read_text())
    config |= {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
    config |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config |= {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
    (path / "model/config.json").write_text(json.dumps(config))
    make_documents(path / "data", 40)
    make_documents(path / "heldout", 5)
    return path


def words_for(workspace: Path, run_dir: Path, ranks: int, *more: str) -> list[str]:
    # With a large eps: else Adam's first steps turn on the sign of gradients that are all rounding.
    settings = overrides(workspace, run_dir, "log.every=2", "optim.eps=1e-3")
    settings += ["evaluation.max_questions=0"]
    return [*settings, f"engine.gradient_accumulation_steps={2 // ranks}", *more]


def run_stage(words: list[str]) -> None:
    from triptych_core.config import load_config

    stage = moe_stage()
    stage.main(load_config(stage.MoEStageConfig, None, words))


@pytest.fixture(scope="module")
def finished(workspace) -> Path:
    """Four steps of one rank, with a checkpoint after the second."""
    words = words_for(workspace, workspace / "one", 1, "engine.zero.stage=0", "checkpoint.keep=9")
    run_ranks(run_stage, 1, words)
    return workspace / "one"


def check_same(found: Path, wanted: Path, rel: float = 2e-5) -> None:
    """Figures of the last two steps, held-out loss, and the weights in the export."""
    for ours, theirs in zip(metrics(found)[2:], metrics(wanted)[2:], strict=True):
        for name in ("loss", "grad_norm", "balance_loss", "z_loss", "num_targets", "flops"):
            assert ours[name] == pytest.approx(theirs[name], rel=rel), name
    assert metrics(found)[-1]["expert_load"] == metrics(wanted)[-1]["expert_load"]
    ours, theirs = (
        [json.loads(line) for line in (run / "evaluation.jsonl").open()] for run in (found, wanted)
    )
    assert ours[-1]["heldout_loss"] == pytest.approx(theirs[-1]["heldout_loss"], rel=rel)
    ours, theirs = (load_file(run / "export/model.safetensors") for run in (found, wanted))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=rel)


def test_the_stage_with_divided_experts_ends_like_one_rank(workspace, finished):
    words = ["engine.zero.stage=3", "parallel.expert=2", "checkpoint.keep=9"]
    two = workspace / "two"
    run_ranks(run_stage, 2, words_for(workspace, two, 2, *words))
    check_same(two, finished)
    check_averaged(two, finished)
    assert [len(line.get("expert_load", ())) for line in metrics(two)] == [0, 2, 0, 2]
    stock = AutoModelForCausalLM.from_pretrained(two / "export")
    assert stock.config.num_experts == 4


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_run_goes_on_with_experts_divided_otherwise(workspace, finished, stage):
    run_dir = workspace / f"divided-{stage}"
    copy_until_step_2(finished, run_dir)
    more = [f"engine.zero.stage={stage}", "parallel.expert=2", "checkpoint.keep=9"]
    words = words_for(workspace, run_dir, 2, *more)
    run_ranks(run_stage, 2, words)
    check_same(run_dir, finished)
    check_same_state(run_dir, finished)
    check_averaged(run_dir, finished)


def check_averaged(run: Path, other: Path) -> None:
    """The averager finds the run's export in its checkpoint, and averages it with another's."""
    inputs = run / "checkpoints/step-000004", other / "checkpoints/step-000002"
    export = load_file(run / "export/model.safetensors")
    ours, theirs = (read(open_source(path)) for path in inputs)
    assert_same(ours, export)
    wanted = {name: (value + theirs[name]) / 2 for name, value in export.items()}
    assert_same(average(run / "average", *inputs), wanted)
    assert_same(average(run / "mixed", run / "export", inputs[1]), wanted)


def copy_until_step_2(source: Path, target: Path) -> None:
    shutil.copytree(source, target)
    shutil.rmtree(target / "checkpoints/step-000004")
    shutil.rmtree(target / "export")


def check_same_state(found: Path, wanted: Path) -> None:
    """Of stacked experts, as one rank would read them that has them all."""
    from triptych_core.checkpoint.payload import Payloads, Stretch

    ours, theirs = (
        Payloads(sorted((run / "checkpoints/step-000004").glob("rank-*.safetensors")))
        for run in (found, wanted)
    )
    name = "hf.model.layers.1.mlp.experts.gate_up_proj"
    for kind in ("master", "exp_avg", "exp_avg_sq"):
        values = [torch.empty(4 * 32 * 48) for _ in (ours, theirs)]
        for payloads, value in zip((ours, theirs), values, strict=True):
            payloads.fill(Stretch(name, kind, 0, value))
        torch.testing.assert_close(*values, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("words", "world_size", "message"),
    [
        (["parallel.expert=3"], 3, "must divide the model's 4 experts"),
        (["parallel.expert=2"], 1, r"parallel\.expert: must divide the number of ranks \(1\)"),
        (["parallel.expert=2", "plan.ranks=3", "plan.show=table"], 1, "must be a multiple of"),
        (["parallel.expert=2", "parallel.tensor=2", "engine.zero.stage=1"], 1, "tensor: must be 1"),
        (
            ["parallel.expert=2", "engine.zero.stage=3", "engine.zero.offload_optimizer=true"],
            1,
            "must not offload",
        ),
        (["engine.mlp_chunks=2"], 1, "must be 1 with experts"),
    ],
)
def test_what_cannot_be_is_refused(workspace, words, world_size, message):
    words = words_for(workspace, workspace / "refused", 1, "engine.zero.stage=0", *words)
    with pytest.raises(RuntimeError, match=message):
        run_ranks(run_stage, world_size, words)


@pytest.mark.parametrize(
    ("word", "stage", "rel"),
    [
        ("model.freeze=[experts]", 3, 2e-5),
        ("optim.name=muon", 0, 5e-4),  # as two ranks with all experts: Newton-Schulz magnifies
    ],
)
def test_so_it_does_with_frozen_experts_and_with_muon(workspace, word, stage, rel):
    one, two = workspace / f"alone-{stage}", workspace / f"shared-{stage}"
    more = [word, "checkpoint.keep=9"]
    run_ranks(run_stage, 1, words_for(workspace, one, 1, "engine.zero.stage=0", *more))
    copy_until_step_2(one, two)
    more += [f"engine.zero.stage={stage}", "parallel.expert=2"]
    run_ranks(run_stage, 2, words_for(workspace, two, 2, *more))
    check_same(two, one, rel)


def test_all_experts_on_every_rank_are_planned(workspace, finished):
    words = words_for(workspace, workspace / "planned", 1, "engine.zero.stage=auto")
    # Not here: after a backward on fake tensors one cannot fork.
    [(parameters, stage)] = run_ranks(planned, 1, words)
    known = json.loads((finished / "run.json").read_text())["parameters"]
    assert (parameters, stage) == (sum(known.values()), 0)


def planned(words: list[str]) -> tuple[int, int]:
    from triptych_core.config import load_config

    stage = moe_stage()
    made = stage.plan(load_config(stage.MoEStageConfig, None, words))
    assert made.chosen is not None
    return made.parameters, made.chosen.stage


def test_a_dense_model_is_refused(tmp_path):
    make_text_model_dir(tmp_path / "model")
    with pytest.raises(ValueError, match=r"model.path: must hold a mixture of experts"):
        run_stage(words_for(tmp_path, tmp_path / "run", 1))


def test_the_shipped_configuration_is_read():
    from triptych_core.config import load_config

    stage = moe_stage()
    config = load_config(stage.MoEStageConfig, ROOT / "stages/configs/moe_tiny.yaml")
    assert config.model.moe is not None
    assert (config.model.moe.aux_loss, config.model.moe.aux_over) == (0.01, "row")
    config = load_config(stage.MoEStageConfig, ROOT / "stages/configs/moe_bias_tiny.yaml")
    assert config.model.moe is not None
    assert (config.model.moe.aux_loss, config.model.moe.bias_rate) == (0, 0.001)
