"""Experts divided over ranks: everything equals one rank that has all of them.

Gradients of routers, experts and the rest, the clip norm and the load, under every ZeRO stage, with
and without rows that ranks share, also where one expert gets all tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401  once, and not on every rank
import pytest
import torch

from tests.models import tiny
from tests.models.tiny import document
from tests.ranks import run_ranks
from tests.stages.test_sequence import family_of
from tests.stages.test_sequence import rows as rows_with_images

SEQ_LEN = 64
FOLDERS = {
    "qwen3_moe": tiny.write_moe_model_dir,
    "qwen2_moe": tiny.write_qwen2_moe_model_dir,  # with a shared expert
    "qwen3_vl_moe": tiny.write_vl_moe_model_dir,
}
LOSSES = {"aux_loss": 0.2, "z_loss": 0.05, "aux_over": "document"}


def rows(family: str) -> list[dict[str, Any]]:
    """Four packed rows: of text, one with padding for the most part; or with images, one without.

    Those with images are test_sequence.py's, whose documents cross the borders of ranks.
    """
    if family == "qwen3_vl_moe":
        return rows_with_images()
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
def folders(tmp_path_factory) -> dict[str, Path]:
    path = tmp_path_factory.mktemp("moe")
    return {family: write(path / family, tied=True) for family, write in FOLDERS.items()}


Reference = Callable[[str, int, bool], tuple[dict[str, Any], dict[str, torch.Tensor]]]


@pytest.fixture(scope="module")
def reference(folders) -> Reference:
    """By family, number of rows, and whether one expert gets all: a step's figures, gradients."""

    @cache
    def of(family: str, count: int, forced: bool) -> Any:
        model = build(folders[family], forced)
        batches = rows(family)[:count]
        targets = sum(batch["num_targets"] for batch in batches)
        outputs = [model(**forward_of(batch)) for batch in batches]
        loss = sum(out.loss_sum for out in outputs) / targets
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        norm = torch.stack([g.norm() for g in gradients]).norm().item()
        sums = {key: sum(out.metrics[key] for out in outputs) for key in outputs[0].metrics}
        figures = {"loss": loss.item(), "grad_norm": norm}
        for key, value in sums.items():
            figures[key] = value.tolist() if value.dim() else value.item() / targets
        return figures, dict(zip(dict(model.named_parameters()), gradients, strict=True))

    return of


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
    from triptych_core.engine.build import (
        build_engine,
        compute_dtype,
        gather_parameters,
        sharded_init,
    )
    from triptych_core.loop import train
    from triptych_core.metrics import Metrics
    from triptych_core.optim.groups import build_optimizer, parameter_groups
    from triptych_core.parallel.expert import make_expert_place
    from triptych_core.parallel.mesh import make_mesh
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
    mine = rows(family_of(folder))[: mesh.dp_size * accumulation][mesh.dp_rank :: mesh.dp_size]
    part = partial(take_part, group=group)
    with Metrics(config, **ranks) as metrics:
        train(engine, iter(mine), config, flops=model.flops, metrics=metrics, part=part)
    engine.destroy()
    dist.barrier()
    return json.loads((config.run.dir / "metrics.jsonl").read_text()), gradients


EVERY_STAGE = [(2, 1, stage, 1) for stage in (0, 1, 2, 3)]


@pytest.mark.parametrize(
    ("family", "world_size", "runs"),
    [
        (
            "qwen3_moe",
            2,
            [
                *((1, 1, stage, 1) for stage in (0, 3)),
                *EVERY_STAGE,
                *((2, 1, stage, 2) for stage in (1, 2, 3)),
                (2, 2, 0, 2),
                (2, 2, 3, 2, "full"),
                (2, 1, 3, 1, "selective"),
                (2, 1, 0, 2, "none", True),
                (2, 1, 3, 2, "full", True),
            ],
        ),
        (
            "qwen3_moe",
            4,
            [
                *EVERY_STAGE,
                *((4, 1, stage, 1) for stage in (0, 2, 3)),
                (2, 2, 3, 2),
                (4, 2, 1, 2),
            ],
        ),
        ("qwen2_moe", 2, [*EVERY_STAGE, (2, 2, 3, 2, "selective")]),
        (
            "qwen3_vl_moe",
            2,
            [
                (1, 1, 3, 2),  # every stage, and shared rows: test_combinations.py
                (2, 1, 2, 2),
                (2, 1, 3, 2, "full", True),
            ],
        ),
    ],
)
def test_divided_experts_give_the_gradients_of_one_rank(
    folders, reference, family, world_size, runs
):
    results = run_ranks(on_a_rank, world_size, folders[family], runs)
    for run, *by_rank in zip(runs, *results, strict=True):
        _, sequence, _, accumulation, *rest = run
        count = world_size // sequence * accumulation
        figures, wanted = reference(family, count, rest[1:] == [True])
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
