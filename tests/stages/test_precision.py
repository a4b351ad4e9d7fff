"""bf16 with fp32 masters, and offloading: losses follow fp32, updates are exactly AdamW's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from tests.tiny import make_model_dir, make_shards, whole_gradients, whole_masters

STEPS = 3
CASES = {
    "fp32-0": ["engine.precision=fp32", "engine.zero.stage=0"],
    "fp32-offload": [
        "engine.precision=fp32",
        "engine.zero.stage=3",
        "engine.zero.offload_optimizer=true",
        "engine.zero.offload_params=true",
    ],
    "bf16-0": ["engine.zero.stage=0"],
    "bf16-0-window": ["engine.zero.stage=0", "engine.gradient_accumulation_steps=2"],
    "bf16-0-bf16-sums": ["engine.zero.stage=0", "engine.reduce_dtype=bf16"],
    "bf16-1": ["engine.zero.stage=1"],
    "bf16-2": ["engine.zero.stage=2"],
    "bf16-3": ["engine.zero.stage=3"],
    "bf16-offload": ["engine.zero.stage=2", "engine.zero.offload_optimizer=true"],
}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict[str, Any]]:
    path = tmp_path_factory.mktemp("precision")
    make_model_dir(path / "model")
    make_shards(path / "train", 24)
    return run_ranks(train_all, 2, path)[0]


def train_all(workspace: Path) -> dict[str, dict[str, Any]]:
    return {name: train_one(workspace, name, words) for name, words in CASES.items()}


def train_one(workspace: Path, name: str, words: list[str]) -> dict[str, Any]:
    """Train a few steps; losses, and how far masters are from plain AdamW on the same gradients."""
    from triptych_core.config import StageConfig, load_config
    from triptych_core.engine.build import (
        build_engine,
        compute_dtype,
        gather_parameters,
        sharded_init,
    )
    from triptych_core.launch import launch
    from triptych_core.loop import train
    from triptych_core.metrics import Metrics
    from triptych_core.optim.groups import build_optimizer, parameter_groups
    from triptych_data.config import DataConfig
    from triptych_data.loader import PackLoader
    from triptych_data.processor import Processor
    from triptych_models.config import ModelConfig
    from triptych_models.families import build_model
    from triptych_models.freeze import parameter_parts

    run_dir = workspace / "runs" / name
    common = [f"run.dir={run_dir}", f"run.steps={STEPS}", "run.device=cpu", "optim.lr=1e-2"]
    plain = ["optim.max_grad_norm=0", "optim.weight_decay=0.1", "schedule.kind=constant"]
    config = load_config(StageConfig, None, [*common, *plain, *words])
    runtime = launch(config.run)
    if runtime.is_main:
        run_dir.mkdir(parents=True)
    processor = Processor.from_directory(workspace / "model")
    data = DataConfig(shards=[str(workspace / "train/shards")], seq_len=256, num_workers=0)
    batches = PackLoader(data, processor, rank=runtime.rank, world_size=runtime.world_size)
    with sharded_init(config.engine, runtime.world_size):
        model = build_model(
            ModelConfig(path=workspace / "model", init="random"),
            dtype=compute_dtype(config.engine),
            gather=gather_parameters(config.engine),
        )
    groups = parameter_groups(
        model.named_parameters(), config.optim, parameter_parts(model).__getitem__
    )
    decays = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    decay_of = {n: decays[id(p)] for n, p in model.named_parameters()}
    optimizer = build_optimizer(groups, config.optim)
    engine = build_engine(model, optimizer, config.engine, config.optim, runtime.world_size)

    wanted = {n: m.double().clone().requires_grad_() for n, m in whole_masters(engine).items()}
    start = {n: w.detach().clone() for n, w in wanted.items()}
    plain_adamw = torch.optim.AdamW(
        [{"params": [w], "weight_decay": decay_of[n]} for n, w in wanted.items()],
        lr=config.optim.lr,
        betas=(config.optim.beta1, config.optim.beta2),
        eps=config.optim.eps,
    )
    take_step = engine.step

    def step_both() -> None:
        if engine.is_gradient_accumulation_boundary():
            for parameter_name, gradient in whole_gradients(engine).items():
                wanted[parameter_name].grad = gradient.double()
            plain_adamw.step()
        take_step()

    engine.step = step_both
    with Metrics(config, rank=runtime.rank, world_size=runtime.world_size) as metrics:
        train(engine, iter(batches), config, flops=model.flops, metrics=metrics)
    ours = whole_masters(engine)
    update = max((wanted[n] - start[n]).abs().max().item() for n in wanted)
    off = max((ours[n].double() - wanted[n]).abs().max().item() for n in wanted)
    dtypes = {str(m.dtype) for m in ours.values()}
    engine.destroy()
    torch.distributed.barrier()
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return {
        "losses": [json.loads(line)["loss"] for line in lines],
        "off": off / update,
        "dtypes": dtypes,
    }


@pytest.mark.parametrize("name", [name for name in CASES if "window" not in name])  # other rows
def test_losses_follow_the_fp32_run(results, name):
    wanted = results["fp32-0"]["losses"]
    assert wanted[-1] < wanted[0] - 0.5
    tolerance = 1e-5 if name.startswith("fp32") else 2e-2
    assert results[name]["losses"] == pytest.approx(wanted, rel=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_masters_move_as_plain_adamw_moves_them(results, name):
    assert results[name]["dtypes"] == {"torch.float32"}
    assert results[name]["off"] < 1e-4  # of the largest update, after three steps
