"""Rows that several ranks hold between them: everything equals one rank that has them whole.

Rows of 128 tokens with documents and images across every border, a row of text alone, one whose
targets are all in the first part, one whose images are all in the last.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401  once, and not on every rank
import pytest
import torch

from tests.models import tiny
from tests.models.tiny import document
from tests.ranks import run_ranks

SEQ_LEN = 128


def documents(family: str = "qwen3_vl") -> list[list[tiny.Document]]:
    """The documents of four rows; of text alone for qwen3."""
    straddling = [
        document(1, words=20),
        document(2, words=3, grids=[(1, 4, 6)]),  # its image is cut at 32
        document(3, words=4, grids=[(1, 8, 2), (1, 12, 4), (1, 2, 2), (2, 4, 4)]),
        document(4, words=11),
    ]
    text = [document(5, words=5), document(6, words=110)]
    first_only = [document(7, words=18), document(8, words=12)]
    last_only = [document(9, words=99), document(10, words=4, grids=[(1, 4, 4), (1, 4, 2)])]
    if family == "qwen3":
        return [[*text, document(11, words=3)], first_only, text[:1], text]
    return [straddling, text, first_only, last_only]


def rows(family: str = "qwen3_vl") -> list[dict[str, Any]]:
    """`documents` as the data package would give them, packed."""
    pack = tiny.pack_text if family == "qwen3" else tiny.pack
    made = [pack(row, SEQ_LEN) for row in documents(family)]
    for row in made:
        row["num_tokens"] = int((row["input_ids"] != tiny.PAD).sum())
        row["sample_keys"] = []
    return made


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[int | str, Path]:
    """Model directories with 4 query heads: with images and 2 or 1 key heads, and of text alone."""
    path = tmp_path_factory.mktemp("sequence")
    made: dict[int | str, Path] = {"text": tiny.write_text_model_dir(path / "text", tied=True)}
    for kv_heads in (2, 1):
        made[kv_heads] = tiny.write_model_dir(path / f"kv{kv_heads}", tied=True)
        file = made[kv_heads] / "config.json"
        config = json.loads(file.read_text())
        config["text_config"]["num_key_value_heads"] = kv_heads
        file.write_text(json.dumps(config))
    return made


def build(folder: Path, **settings: Any) -> Any:
    from triptych_models.config import ModelConfig
    from triptych_models.families import build_model

    config = ModelConfig(path=folder, init="random", seed=3)
    return build_model(config, dtype=torch.float32, **settings)


@pytest.fixture(scope="module")
def reference(folders) -> dict[tuple[Any, int], tuple[dict[str, float], dict[str, torch.Tensor]]]:
    """By model and number of rows: a step's figures and gradients of one rank."""
    found = {}
    for which, folder in folders.items():
        model = build(folder)
        for count in (1, 2, 4):
            model.zero_grad()
            batches = rows(family_of(folder))[:count]
            figures = {
                "num_targets": sum(batch["num_targets"] for batch in batches),
                "num_tokens": sum(batch["num_tokens"] for batch in batches),
                "flops": sum(int(model.flops(batch)) for batch in batches),
            }
            figures["packing_fill"] = figures["num_tokens"] / (count * SEQ_LEN)
            outputs = [model(**forward_of(batch)).loss_sum for batch in batches]
            loss = sum(outputs) / figures["num_targets"]
            loss.backward()
            gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
            figures["loss"] = loss.item()
            figures["grad_norm"] = norm_of(gradients)
            found[which, count] = figures, gradients
    return found


def family_of(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text())["model_type"]


def forward_of(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in batch.items() if name not in ("num_tokens", "sample_keys")}


def norm_of(gradients: dict[str, torch.Tensor]) -> float:
    return torch.stack([g.norm() for g in gradients.values()]).norm().item()


def on_a_rank(folder: Path, runs: list[tuple[Any, ...]]) -> list[Any]:
    """A step for each of (ranks a row, stage, accumulation, checkpointing, chunks of the MLPs)."""
    from triptych_core.config import RunConfig
    from triptych_core.launch import launch

    runtime = launch(RunConfig(device="cpu"))
    return [a_step(folder, runtime, *run) for run in runs]


def a_step(
    folder: Path,
    runtime: Any,
    size: int,
    stage: int,
    accumulation: int,
    checkpointing: str,
    mlp_chunks: int = 1,
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """One step of the real loop: its line of metrics.jsonl, and gradients before clipping."""
    import torch.distributed as dist

    from tests.tiny import whole_gradients
    from triptych_core.config import StageConfig, load_config
    from triptych_core.engine.build import build_engine, gather_parameters, sharded_init
    from triptych_core.loop import train
    from triptych_core.metrics import Metrics
    from triptych_core.optim.groups import build_optimizer, parameter_groups
    from triptych_core.parallel.mesh import make_mesh
    from triptych_models.freeze import parameter_parts
    from triptych_models.sequence import SequenceGroup
    from triptych_models.sequence_batch import take_part

    words = [
        f"run.dir={folder}/run-{runtime.world_size}-{size}-{stage}-{accumulation}-{checkpointing}{mlp_chunks}",
        "run.steps=1",
        "engine.precision=fp32",
        f"engine.zero.stage={stage}",
        f"engine.gradient_accumulation_steps={accumulation}",
        "engine.zero.persistence_threshold=0",
        "engine.zero.bucket_size=5000",
        "optim.max_grad_norm=0.5",
        f"parallel.sequence={size}",
    ]
    config = load_config(StageConfig, None, words)
    mesh = make_mesh(config.parallel, runtime)
    group = SequenceGroup(mesh.sp_group, mesh.sp_size, mesh.sp_rank)
    ranks = {"rank": runtime.rank, "world_size": runtime.world_size}
    if runtime.is_main:
        config.run.dir.mkdir()
    with sharded_init(config.engine, runtime.world_size):
        model = build(folder, gather=gather_parameters(config.engine), sequence=group)
    model.set_checkpointing(checkpointing)
    model.set_mlp_chunks(mlp_chunks)
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
    mine = rows(family_of(folder))[: mesh.dp_size * accumulation][mesh.dp_rank :: mesh.dp_size]
    part = partial(take_part, group=group)
    with Metrics(config, **ranks) as metrics:
        train(engine, iter(mine), config, flops=model.flops, metrics=metrics, part=part)
    engine.destroy()
    dist.barrier()
    return json.loads((config.run.dir / "metrics.jsonl").read_text()), gradients


STAGES = [(2, stage, 1, "none") for stage in (0, 1, 2, 3)]


@pytest.mark.parametrize(
    ("world_size", "which", "runs"),
    [
        # Two ranks a row; what else goes with it is in test_combinations.py.
        (2, 2, STAGES),
        # Fewer key heads than ranks; and two rows at a time, two ranks each.
        (4, 2, [(4, 3, 1, "full"), (4, 1, 2, "none"), (2, 3, 2, "none")]),
        (4, 1, [(4, 2, 2, "none"), (2, 0, 2, "full")]),
        (2, "text", [(2, 3, 2, "none"), (2, 0, 1, "full")]),
        # What goes with long rows, with rows shared and not.
        (
            2,
            1,
            [
                (2, 3, 2, "offload", 3),
                (1, 3, 2, "offload"),
                (1, 1, 1, "full", 3),
                (2, 0, 2, "none", 3),
            ],
        ),
    ],
)
def test_a_shared_row_gives_the_gradients_of_one_rank(folders, reference, world_size, which, runs):
    results = run_ranks(on_a_rank, world_size, folders[which], runs)
    for run, *by_rank in zip(runs, *results, strict=True):
        size, _, accumulation, *_ = run
        figures, wanted = reference[which, world_size // size * accumulation]
        for line, gradients in by_rank:
            for name, value in figures.items():
                assert line[name] == pytest.approx(value, rel=1e-5), (run, name)
            assert gradients.keys() == wanted.keys()
            for name, gradient in gradients.items():
                error = (gradient - wanted[name]).norm().item()
                # A weight's gradient may be tiny beside the rest, as in test_parity.
                scale = max(wanted[name].norm().item(), 1e-4 * figures["grad_norm"])
                assert error <= 1e-5 * scale, f"{run}: {name} off by {error / scale:.1e}"


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


def test_what_a_document_says_does_not_reach_others_on_any_rank(folders):
    before, after = rows()[0], rows()[0]
    begin, end = before["cu_seqlens"][1:3].tolist()  # the second document, which is cut at 32
    assert begin < SEQ_LEN // 4 < end
    after["input_ids"][0, begin] += 1
    after["pixel_values"][0] = 255 - after["pixel_values"][0]
    by_rank = run_ranks(hidden_states, 2, folders[2], [before, after])
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
    from triptych_models.pretend import (
        CROSSINGS,
        build_pretend_model,
        pretend,
        pretend_batch,
        pretend_part,
    )
    from triptych_models.sequence import SequenceGroup

    mesh = make_mesh(ParallelConfig(sequence=2), launch(RunConfig(device="cpu")))
    shape = {"document_len": 512, "image_share": 0.5, "target_share": 1.0, "image_tokens": 16}

    def traced(model: Any, group: SequenceGroup, way: str) -> Any:
        model.set_checkpointing(way)
        part = pretend_part(pretend_batch(model, 1024, **shape), group)
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
    with pretend(shapes, "cpu"):
        return list(zip(measured, [traced(shapes, first, way) for way in ways], strict=True))


def test_the_plan_knows_what_a_part_of_a_row_takes(folders):
    for by_way in run_ranks(planned_and_real, 2, folders[2]):
        for measured, planned in by_way:
            assert planned.kept == pytest.approx(measured.kept, rel=0.07)
            assert planned.products == pytest.approx(measured.products, rel=0.2)
            assert planned.crossing == measured.crossing > 0


@pytest.mark.slow
def test_compiled_layers_exchange_too(folders):
    """With chunked MLPs, and every way of checkpointing that goes with compilation."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    case = Path(__file__).with_name("sequence_on_ranks.py")
    ran = subprocess.run([*command, str(case), str(folders[2])], capture_output=True, text=True)
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
