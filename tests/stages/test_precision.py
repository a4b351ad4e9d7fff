"""bf16 with fp32 masters, and offloading: the same run as plain fp32, up to bf16's rounding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.ranks import run_ranks
from tests.tiny import make_model_dir, make_shards

STEPS = 4


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("precision")
    make_model_dir(path / "model")
    make_shards(path / "train", 24)
    return path


def train_all(workspace: Path, cases: dict[str, list[str]]) -> dict[str, list[float]]:
    """Train once per case in this process; the losses of each."""
    import torch

    from triptych_core.config import StageConfig, load_config
    from triptych_core.engine import build_engine, compute_dtype, gather_parameters, sharded_init
    from triptych_core.launch import launch
    from triptych_core.loop import train
    from triptych_core.metrics import Metrics
    from triptych_core.optim import build_adamw, parameter_groups
    from triptych_data.config import DataConfig
    from triptych_data.loader import PackLoader
    from triptych_data.processor import Processor
    from triptych_models.config import ModelConfig
    from triptych_models.families import build_model
    from triptych_models.freeze import parameter_parts

    losses = {}
    for name, words in cases.items():
        run_dir = workspace / "runs" / name
        common = [f"run.dir={run_dir}", f"run.steps={STEPS}", "run.device=cpu", "optim.lr=1e-2"]
        config = load_config(StageConfig, None, [*common, *words])
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
        engine = build_engine(
            model,
            build_adamw(groups, config.optim),
            config.engine,
            config.optim,
            runtime.world_size,
        )
        with Metrics(config, rank=runtime.rank, world_size=runtime.world_size) as metrics:
            train(engine, iter(batches), config, flops=model.flops, metrics=metrics)
        for state in (
            engine.optimizer.optimizer.state.values()
            if hasattr(engine.optimizer, "optimizer")
            else []
        ):
            assert state["exp_avg"].dtype == torch.float32, name
        engine.destroy()
        torch.distributed.barrier()
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["loss"] for line in lines]
    return losses


CASES = {
    "fp32": ["engine.precision=fp32", "engine.zero.stage=0"],
    "fp32-offload": [
        "engine.precision=fp32",
        "engine.zero.stage=3",
        "engine.zero.offload_optimizer=true",
        "engine.zero.offload_params=true",
    ],
    "bf16-0": ["engine.zero.stage=0"],
    "bf16-1": ["engine.zero.stage=1"],
    "bf16-2": ["engine.zero.stage=2"],
    "bf16-3": ["engine.zero.stage=3"],
    "bf16-offload": ["engine.zero.stage=2", "engine.zero.offload_optimizer=true"],
}


def test_losses_follow_the_fp32_run(workspace):
    losses, _ = run_ranks(train_all, 2, workspace, CASES)
    wanted = losses["fp32"]
    assert wanted[-1] < wanted[0] - 0.5
    for name, values in losses.items():
        tolerance = 1e-5 if name.startswith("fp32") else 2e-2
        assert values == pytest.approx(wanted, rel=tolerance), name
