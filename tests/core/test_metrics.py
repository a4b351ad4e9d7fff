"""metrics.jsonl: one line a step, each once, whatever happened before."""

import json

import pytest
import torch

from triptych_core.config import StageConfig, load_config
from triptych_core.metrics import Metrics, StepRecord


@pytest.fixture
def config(tmp_path) -> StageConfig:
    return load_config(StageConfig, None, [f"run.dir={tmp_path}", "log.peak_tflops=1e-6"])


def record(step: int, loss: float = 1.0) -> StepRecord:
    return StepRecord(
        step=step,
        loss=torch.tensor(loss),
        counts=torch.tensor([10, 60, 500, 1]),
        grad_norm=0.5,
        lr=0.1,
        capacity=100,
        data_wait_seconds=0.0,
    )


def lines(config: StageConfig) -> list[dict]:
    return [json.loads(line) for line in (config.run.dir / "metrics.jsonl").open()]


def test_every_step_is_written_once_the_last_one_on_leaving(config):
    with Metrics(config, rank=0, world_size=2) as metrics:
        for step in (1, 2, 3):
            metrics.record(record(step))
            assert [line["step"] for line in lines(config)] == list(range(1, step))
    assert [line["step"] for line in lines(config)] == [1, 2, 3]


def test_derived_figures(config):
    with Metrics(config, rank=0, world_size=2) as metrics:
        metrics.record(record(1, loss=2.5))
    (line,) = lines(config)
    assert line["loss"] == 2.5
    assert line["packing_fill"] == 0.6
    assert line["tokens_per_second"] == pytest.approx(60 / line["step_seconds"])
    # 1e-6 TFLOP/s a rank, two ranks: 2e6 FLOP/s
    assert line["mfu"] == pytest.approx(500 / line["step_seconds"] / 2e6)


def test_a_resumed_run_replaces_the_steps_it_takes_again_and_a_torn_line(config):
    with Metrics(config, rank=0, world_size=1) as metrics:
        for step in (1, 2, 3):
            metrics.record(record(step))
    with (config.run.dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    with Metrics(config, rank=0, world_size=1, start_step=2) as metrics:
        metrics.record(record(3, loss=9.0))
    assert [(line["step"], line["loss"]) for line in lines(config)] == [(1, 1), (2, 1), (3, 9)]


def test_other_ranks_write_nothing(config):
    with Metrics(config, rank=1, world_size=2) as metrics:
        metrics.record(record(1))
    assert not (config.run.dir / "metrics.jsonl").exists()


def test_wandb_offline_writes_a_run(config, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    offline = config.model_copy(update={"log": config.log.model_copy(update={"wandb": "offline"})})
    with Metrics(offline, rank=0, world_size=1) as metrics:
        metrics.record(record(1))
    assert list((config.run.dir / "wandb").glob("offline-run-*/*.wandb"))
