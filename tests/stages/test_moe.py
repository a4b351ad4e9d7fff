"""Experts divided over ranks: everything equals one rank that has all of them.

Gradients of routers, experts and the rest, the clip norm and the load, for every ZeRO stage that
is offered, with and without rows that ranks share; experts without tokens; checkpoints that go on
with the experts divided otherwise.
"""

from __future__ import annotations

import json
import shutil
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import deepspeed  # noqa: F401  once, and not on every rank
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.models import tiny
from tests.models.tiny import document
from tests.ranks import run_ranks
from tests.stages.test_pretrain import make_documents, make_text_model_dir, metrics, overrides
from tests.tiny import ROOT

SEQ_LEN = 64
LOSSES = {"aux_loss": 0.2, "z_loss": 0.05, "aux_over": "document"}


def rows() -> list[dict[str, Any]]:
    """Four packed rows of documents of text, one with padding for the most part."""
    chosen = [
        [document(1, words=20), document(2, words=30)],
        [document(3, words=5)],
        [document(4, words=60)],
        [document(5, words=9), document(6, words=9), document(7, words=40)],
    ]
    made = [tiny.pack_text(row, SEQ_LEN) for row in chosen]
    for row in made:
        row["num_tokens"] = int((row["input_ids"] != tiny.PAD).sum())
        row["sample_keys"] = []
    return made


def build(
    folder: Path, forced: bool = False, dtype: torch.dtype = torch.float32, **settings: Any
) -> Any:
    from triptych_models.config import ModelConfig
    from triptych_models.families import build_model

    config = ModelConfig(path=folder, init="random", seed=3, moe=LOSSES)
    model = build_model(config, dtype=dtype, **settings).train()
    for block in model.blocks() if forced else ():
        block.gate.forward = partial(first_expert, block.gate.forward)
    return model


def first_expert(choose: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A router that sends every token to expert 0 twice, and nothing to the others."""
    logits, weights, experts = choose(x)
    return logits, weights, torch.zeros_like(experts)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.write_moe_model_dir(tmp_path_factory.mktemp("moe") / "model", tied=True)


@pytest.fixture(scope="module")
def reference(folder) -> dict[tuple[int, bool], tuple[dict[str, Any], dict[str, torch.Tensor]]]:
    """By number of rows, and whether one expert gets all: a step's figures and gradients."""
    found = {}
    for forced in (False, True):
        model = build(folder, forced)
        for count in (1, 2, 4):
            model.zero_grad()
            batches = rows()[:count]
            targets = sum(batch["num_targets"] for batch in batches)
            outputs = [model(**forward_of(batch)) for batch in batches]
            loss = sum(out.loss_sum for out in outputs) / targets
            loss.backward()
            gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
            norm = torch.stack([g.norm() for g in gradients.values()]).norm().item()
            sums = {key: sum(out.metrics[key] for out in outputs) for key in outputs[0].metrics}
            figures = {
                "loss": loss.item(),
                "grad_norm": norm,
                "balance_loss": sums["balance_loss"].item() / targets,
                "z_loss": sums["z_loss"].item() / targets,
                "expert_load": sums["expert_load"].tolist(),
            }
            found[count, forced] = figures, gradients
    return found


def forward_of(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in batch.items() if name not in ("num_tokens", "sample_keys")}


def on_a_rank(folder: Path, runs: list[tuple[Any, ...]]) -> list[Any]:
    """A step for each of (ranks that divide experts, ranks a row, stage, accumulation, …)."""
    from triptych_core.config import RunConfig
    from triptych_core.launch import launch

    runtime = launch(RunConfig(device="cpu"))
    return [a_step(folder, runtime, *run) for run in runs]


def a_step(
    folder: Path,
    runtime: Any,
    expert: int,
    sequence: int,
    stage: int,
    accumulation: int,
    checkpointing: str = "none",
    forced: bool = False,
    precision: str = "fp32",
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """One step of the real loop: its line of metrics.jsonl, and gradients before clipping."""
    import torch.distributed as dist

    from tests.tiny import whole_gradients
    from triptych_core.config import StageConfig, load_config
    from triptych_core.engine import build_engine, compute_dtype, gather_parameters, sharded_init
    from triptych_core.expert import make_expert_place
    from triptych_core.loop import train
    from triptych_core.metrics import Metrics
    from triptych_core.optim import build_optimizer, parameter_groups
    from triptych_core.parallel import make_mesh
    from triptych_models.experts import ExpertGroup
    from triptych_models.freeze import parameter_parts
    from triptych_models.sequence import SequenceGroup
    from triptych_models.sequence_batch import take_part

    named = "-".join(
        map(str, (expert, sequence, stage, accumulation, checkpointing, forced, precision))
    )
    words = [
        f"run.dir={folder}/run-{runtime.world_size}-{named}",
        "run.steps=1",
        f"engine.precision={precision}",
        f"engine.zero.stage={stage}",
        f"engine.gradient_accumulation_steps={accumulation}",
        "engine.zero.persistence_threshold=100",
        "engine.zero.bucket_size=5000",
        "optim.max_grad_norm=0.05",
        f"parallel.sequence={sequence}",
        f"parallel.expert={expert}",
    ]
    config = load_config(StageConfig, None, words)
    mesh = make_mesh(config.parallel, runtime)
    place = make_expert_place(config.parallel, runtime)
    group = SequenceGroup(mesh.sp_group, mesh.sp_size, mesh.sp_rank)
    ranks = {"rank": runtime.rank, "world_size": runtime.world_size}
    if runtime.is_main:
        config.run.dir.mkdir()
    with sharded_init(config.engine, runtime.world_size):
        model = build(
            folder,
            forced,
            dtype=compute_dtype(config.engine),
            gather=gather_parameters(config.engine),
            sequence=group,
            experts=ExpertGroup(place.group, place.size, place.rank, place.mark),
        )
    model.set_checkpointing(checkpointing)
    groups = parameter_groups(
        model.named_parameters(), config.optim, parameter_parts(model).__getitem__
    )
    optimizer = build_optimizer(groups, config.optim)
    engine = build_engine(
        model, optimizer, config.engine, config.optim, runtime.world_size, model.layers()
    )
    gradients: dict[str, torch.Tensor] = {}
    take_step = engine.step

    def look_then_step() -> None:
        if engine.is_gradient_accumulation_boundary():
            gradients.update(whole_gradients(engine))
        take_step()

    engine.step = look_then_step
    mine = rows()[: mesh.dp_size * accumulation][mesh.dp_rank :: mesh.dp_size]
    part = partial(take_part, group=group)
    with Metrics(config, **ranks) as metrics:
        train(engine, iter(mine), config, flops=model.flops, metrics=metrics, part=part)
    engine.destroy()
    dist.barrier()
    return json.loads((config.run.dir / "metrics.jsonl").read_text()), gradients


@pytest.mark.parametrize(
    ("world_size", "runs"),
    [
        (
            2,
            [
                *((1, 1, stage, 1) for stage in (0, 1, 2, 3)),
                *((2, 1, stage, accumulation) for stage in (0, 1, 2, 3) for accumulation in (1, 2)),
                (2, 2, 0, 2),
                (2, 2, 3, 2, "full"),
                (2, 1, 3, 1, "selective"),
                (2, 1, 0, 2, "none", True),
                (2, 1, 3, 2, "full", True),
            ],
        ),
        (
            4,
            [
                *((2, 1, stage, 1) for stage in (0, 1, 2, 3)),
                *((4, 1, stage, 1) for stage in (0, 2, 3)),
                (2, 2, 3, 2),
                (4, 2, 1, 2),
            ],
        ),
    ],
)
def test_divided_experts_give_the_gradients_of_one_rank(folder, reference, world_size, runs):
    results = run_ranks(on_a_rank, world_size, folder, runs)
    for run, *by_rank in zip(runs, *results, strict=True):
        _, sequence, _, accumulation, *rest = run
        figures, wanted = reference[world_size // sequence * accumulation, rest[1:] == [True]]
        for line, gradients in by_rank:
            for name, value in figures.items():
                found, wanted_value = (torch.tensor(v).double() for v in (line[name], value))
                torch.testing.assert_close(found, wanted_value, rtol=1e-5, atol=0)
            assert gradients.keys() == wanted.keys()
            for name, gradient in gradients.items():
                error = (gradient - wanted[name]).norm().item()
                # A weight's gradient may be tiny beside the rest, as in test_parity.
                scale = max(wanted[name].norm().item(), 1e-4 * figures["grad_norm"])
                assert error <= 1e-5 * scale, f"{run}: {name} off by {error / scale:.1e}"


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
    assert [len(line.get("expert_load", ())) for line in metrics(two)] == [0, 2, 0, 2]
    stock = AutoModelForCausalLM.from_pretrained(two / "export")
    assert stock.config.num_experts == 4


@pytest.mark.parametrize("stage", [0, 2])
def test_a_run_goes_on_with_experts_divided_otherwise(workspace, finished, stage):
    run_dir = workspace / f"divided-{stage}"
    copy_until_step_2(finished, run_dir)
    more = [f"engine.zero.stage={stage}", "parallel.expert=2", "checkpoint.keep=9"]
    words = words_for(workspace, run_dir, 2, *more)
    run_ranks(run_stage, 2, words)
    check_same(run_dir, finished)
    check_same_state(run_dir, finished)


def copy_until_step_2(source: Path, target: Path) -> None:
    shutil.copytree(source, target)
    shutil.rmtree(target / "checkpoints/step-000004")
    shutil.rmtree(target / "export")


def check_same_state(found: Path, wanted: Path) -> None:
    """Of stacked experts, as one rank would read them that has them all."""
    from triptych_core.payload import Payloads, Stretch

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
        (["parallel.expert=2", "engine.zero.stage=auto"], 1, "must be 1 for a plan"),
        (["parallel.expert=2", "parallel.tensor=2", "engine.zero.stage=1"], 1, "tensor: must be 1"),
        (
            ["parallel.expert=2", "engine.zero.stage=3", "engine.zero.offload_optimizer=true"],
            1,
            "must not offload",
        ),
        (["engine.mlp_chunks=2"], 1, "must be 1 with experts"),
        (["parallel.expert=2", "model.compile=layers"], 1, "must be none with parallel.expert"),
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
