"""Rows that several ranks hold between them: a run equals that of one rank that has them whole.

That every gradient does is in test_parity.py and test_combinations.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401  once, and not on every rank
import pytest
import torch

from tests.models import tiny
from tests.ranks import run_ranks
from tests.stages.rows import SEQ_LEN, build, forward_of, rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model with images, 4 query heads and 2 key heads."""
    return tiny.write_model_dir(tmp_path_factory.mktemp("sequence") / "model", tied=True)


def hidden_states(folder: Path, batches: list[dict[str, Any]]) -> list[torch.Tensor]:
    """Of this rank's part of each row, in eval mode."""
    from triptych_core.config import RunConfig
    from triptych_core.launch import launch
    from triptych_core.parallel.mesh import make_mesh
    from triptych_core.sections import ParallelConfig
    from triptych_models.sequence import SequenceGroup
    from triptych_models.sequence_batch import take_part

    mesh = make_mesh(ParallelConfig(sequence=2), launch(RunConfig(device="cpu")))
    group = SequenceGroup(mesh.sp_group, mesh.sp_size, mesh.sp_rank)
    model = build(folder, sequence=group).eval()
    with torch.no_grad():
        parts = [take_part(forward_of(batch), group) for batch in batches]
        return [model.hidden_states(**tiny.inputs_only(part))[0] for part in parts]


def test_what_a_document_says_does_not_reach_others_on_any_rank(folder):
    before, after = rows()[0], rows()[0]
    begin, end = before["cu_seqlens"][1:3].tolist()  # the second document, which is cut at 32
    assert begin < SEQ_LEN // 4 < end
    after["input_ids"][0, begin] += 1
    after["pixel_values"][0] = 255 - after["pixel_values"][0]
    by_rank = run_ranks(hidden_states, 2, folder, [before, after])
    was, now = (torch.cat(parts) for parts in zip(*by_rank, strict=True))  # (T, H)
    changed = (was != now).any(1)
    assert changed[begin:end].all()
    assert not changed[:begin].any() and not changed[end:].any()


def test_the_stage_runs_as_on_one_rank(tmp_path):
    from tests.stages.test_sft import metrics, overrides, run_stage
    from tests.tiny import make_model_dir, make_shards
    from triptych_data.plan.ledger import audit

    make_model_dir(tmp_path / "model")
    make_shards(tmp_path / "train", 14, seed=1)
    make_shards(tmp_path / "heldout", 3, seed=2)
    settings = ["run.steps=2", "optim.lr=1e-3", "export=false", "checkpoint.save=false"]
    run_ranks(run_stage, 1, overrides(tmp_path, tmp_path / "one", *settings))
    settings += ["parallel.sequence=2", "engine.checkpointing=full"]
    run_ranks(run_stage, 2, overrides(tmp_path, tmp_path / "two", *settings))
    for alone, shared in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        for name in ("loss", "grad_norm", "num_targets", "num_tokens", "flops", "packing_fill"):
            assert shared[name] == pytest.approx(alone[name], rel=1e-4), name
    alone, shared = (
        [json.loads(line) for line in (tmp_path / run / "evaluation.jsonl").open()]
        for run in ("one", "two")
    )
    assert [e["counts"] for e in shared] == [e["counts"] for e in alone]
    losses = [[e["heldout_loss"] for e in run] for run in (shared, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    found = audit(tmp_path / "two/ledger")
    assert (found.problems, found.steps) == ([], 2)
    assert found.samples == audit(tmp_path / "one/ledger").samples


@pytest.mark.parametrize(
    ("words", "world_size", "message"),
    [
        (
            ["parallel.sequence=3", "data.seq_len=255"],
            2,
            r"parallel\.sequence: must divide the number of ranks \(2\)",
        ),
        (["parallel.sequence=2", "data.seq_len=255"], 2, r"data\.seq_len: must be a multiple of"),
        (["parallel.sequence=3", "data.seq_len=255"], 3, "must divide the model's 2 attention"),
    ],
)
def test_what_cannot_be_shared_is_refused_with_the_reason(tmp_path, words, world_size, message):
    from tests.stages.test_sft import overrides, run_stage
    from tests.tiny import make_model_dir, make_shards

    make_model_dir(tmp_path / "model")
    make_shards(tmp_path / "train", 8)
    make_shards(tmp_path / "heldout", 2)
    with pytest.raises(RuntimeError, match=message):
        run_ranks(run_stage, world_size, overrides(tmp_path, tmp_path / "run", *words))


def planned_and_real(folder: Path) -> list[tuple[Any, Any]]:
    """A micro-step of this rank as it is, and as the plan sees the first rank's."""
    from triptych_core.config import RunConfig
    from triptych_core.launch import launch
    from triptych_core.parallel.mesh import make_mesh
    from triptych_core.plan.trace import trace_micro_step
    from triptych_core.sections import ParallelConfig
    from triptych_models.config import ModelConfig
    from triptych_models.fake import CROSSINGS, pretend
    from triptych_models.pretend import build_pretend_model, pretend_batch, pretend_part
    from triptych_models.sequence import SequenceGroup

    mesh = make_mesh(ParallelConfig(sequence=2), launch(RunConfig(device="cpu")))
    shape = {"document_len": 512, "image_share": 0.5, "target_share": 1.0, "image_tokens": 16}

    def traced(model: Any, group: SequenceGroup, way: str) -> Any:
        model.set_checkpointing(way)
        part = pretend_part(pretend_batch(model, 1024, **shape), model)
        given = [x for x in part.values() if isinstance(x, torch.Tensor)]
        return trace_micro_step(
            lambda: model(**part).loss_sum,
            model.parameters(),
            [*model.buffers(), *given],
            crossings=CROSSINGS,
        )

    group = SequenceGroup(mesh.sp_group, 2, mesh.sp_rank)
    real = build(folder, sequence=group).train()
    ways = ("none", "full")
    measured = [traced(real, group, way) for way in ways]
    first = SequenceGroup(size=2)
    config = ModelConfig(path=folder, init="random")
    shapes = build_pretend_model(config, dtype=torch.float32, sequence=first)
    with pretend(shapes, device="cpu"):
        return list(zip(measured, [traced(shapes, first, way) for way in ways], strict=True))


def test_the_plan_knows_what_a_part_of_a_row_takes(folder):
    for by_way in run_ranks(planned_and_real, 2, folder):
        for measured, planned in by_way:
            assert planned.kept == pytest.approx(measured.kept, rel=0.07)
            assert planned.products == pytest.approx(measured.products, rel=0.2)
            assert planned.crossing == measured.crossing > 0


@pytest.mark.slow
def test_compiled_layers_exchange_too(folder):
    """With chunked MLPs, and every way of checkpointing that goes with compilation."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    case = Path(__file__).with_name("sequence_on_ranks.py")
    ran = subprocess.run([*command, str(case), str(folder)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]


@pytest.mark.slow
def test_a_run_goes_on_whoever_shares_its_rows(tmp_path):
    """Two ranks a row, then a row each, then four ranks and two rows: as one rank all along."""
    from tests.stages.test_sft import metrics, overrides, run_stage
    from tests.tiny import make_model_dir, make_shards
    from triptych_data.plan.ledger import audit

    make_model_dir(tmp_path / "model")
    make_shards(tmp_path / "train", 30, seed=1)
    settings = ["export=false", "evaluation.shards=[]", "optim.lr=1e-3", "schedule.kind=constant"]

    def go_on(run: str, ranks: int, *words: str) -> None:
        run_ranks(run_stage, ranks, overrides(tmp_path, tmp_path / run, *settings, *words))

    go_on("shared", 2, "run.steps=1", "parallel.sequence=2")
    go_on("shared", 2, "run.steps=2")
    go_on("shared", 4, "run.steps=3", "parallel.sequence=2")
    go_on("alone", 1, "run.steps=1")
    go_on("alone", 1, "run.steps=3", "engine.gradient_accumulation_steps=2")
    for shared, alone in zip(
        *(metrics(tmp_path / run) for run in ("shared", "alone")), strict=True
    ):
        for name in ("loss", "grad_norm", "num_targets", "num_tokens", "flops", "packing_fill"):
            assert shared[name] == pytest.approx(alone[name], rel=1e-5), (shared["step"], name)
    audits = [audit(tmp_path / run / "ledger") for run in ("shared", "alone")]
    assert audits[0] == audits[1] and not audits[0].problems
