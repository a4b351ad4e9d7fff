"""metrics.jsonl: one line a step, each once, whatever happened before."""

import json
import time
from dataclasses import replace

import pytest
import torch

from triptych_core.config import StageConfig, load_config
from triptych_core.metrics import Metrics
from triptych_core.readout import StepRecord

# One grey pixel.
PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg=="
)


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


def intervals_of(config: StageConfig, every: int) -> StageConfig:
    return config.model_copy(update={"log": config.log.model_copy(update={"every": every})})


def test_every_step_is_written_once_the_last_one_on_leaving(config):
    with Metrics(intervals_of(config, 1), rank=0, world_size=2) as metrics:
        for step in (1, 2, 3):
            metrics.record(record(step))
            assert [line["step"] for line in lines(config)] == list(range(1, step))
    assert [line["step"] for line in lines(config)] == [1, 2, 3]


def test_an_interval_is_written_together_when_one_more_step_is_queued(config):
    written = {}
    with Metrics(intervals_of(config, 3), rank=0, world_size=1) as metrics:
        for step in range(1, 9):
            metrics.record(record(step, loss=float(step)))
            written[step] = len(lines(config))
    # The first step by itself, so that a run is seen to begin; then 2 and 3, then 4 to 6.
    assert written == {1: 0, 2: 1, 3: 1, 4: 3, 5: 3, 6: 3, 7: 6, 8: 6}
    assert [(line["step"], line["loss"]) for line in lines(config)] == [
        (n, float(n)) for n in range(1, 9)
    ]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_is_known_is_written_when_a_run_is_broken_off(config, error):
    with (
        pytest.raises(error),
        Metrics(intervals_of(config, 100), rank=0, world_size=1) as metrics,
    ):
        for step in (1, 2, 3, 4):
            metrics.record(record(step, loss=float(step)))
        raise error
    assert [line["loss"] for line in lines(config)] == [1.0, 2.0, 3.0, 4.0]


def test_steps_the_device_has_not_done_are_no_reason_to_wait(config, monkeypatch):
    from triptych_core.readout import Mark

    with (
        pytest.raises(KeyboardInterrupt),
        Metrics(intervals_of(config, 100), rank=0, world_size=1) as metrics,
    ):
        for step in (1, 2, 3):
            metrics.record(record(step))
        # As where a peer never comes to the collective of step 3.
        monkeypatch.setattr(metrics._readout._waiting[-1].ended, "is_past", lambda: False)
        assert Mark().is_past()
        raise KeyboardInterrupt
    assert [line["step"] for line in lines(config)] == [1, 2]


def test_a_norm_may_be_a_tensor_a_number_or_unknown(config):
    with Metrics(intervals_of(config, 3), rank=0, world_size=1) as metrics:
        for step, norm in enumerate((torch.tensor(0.25), None, 2.0, torch.tensor(4.0)), start=1):
            metrics.record(replace(record(step), grad_norm=norm))
    assert [line["grad_norm"] for line in lines(config)] == [0.25, None, 2.0, 4.0]


def test_a_step_lasts_from_the_end_of_the_one_before_with_its_wait(config):
    with Metrics(intervals_of(config, 2), rank=0, world_size=1) as metrics:
        metrics.record(record(1))
        time.sleep(0.05)
        metrics.record(replace(record(2), data_wait_seconds=0.05))
        metrics.restart_clock()
        time.sleep(0.2)
        metrics.restart_clock()  # as after an evaluation
        metrics.record(record(3))
    _, second, third = lines(config)
    assert second["step_seconds"] >= 0.05 > third["step_seconds"]
    assert second["data_wait_seconds"] == 0.05
    assert second["tokens_per_second"] <= 60 / 0.05


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


def test_an_evaluation_stands_in_the_line_of_its_step(config):
    with Metrics(intervals_of(config, 3), rank=0, world_size=1) as metrics:
        metrics.record_evaluation(0, {"eval/loss": 9.0}, [])  # no line yet
        for step in (1, 2, 3, 4):
            metrics.record(record(step))
            if step % 2 == 0:
                metrics.record_evaluation(step, {"eval/loss": 2.0 * step, "eval/anls": 0.5}, [])
    found = lines(config)
    assert [line["step"] for line in found] == [1, 2, 3, 4]
    assert [line.get("eval/loss") for line in found] == [None, 4.0, None, 8.0]
    assert [line.get("eval/anls") for line in found] == [None, 0.5, None, 0.5]
    assert {"loss", "time"} <= set(found[1])


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
        images = ["data:image/png;base64," + PIXEL]
        example = {"key": "a", "question": "all", "prompt": "?", "expected": "7", "answer": "1"}
        metrics.record_evaluation(1, {"eval/loss": 2.0}, [example | {"images": images}])
    media = (config.run.dir / "wandb/latest-run").resolve() / "files/media"
    assert len(list(media.rglob("*.png"))) == len(list(media.rglob("answers*.table.json"))) == 1
    assert list((config.run.dir / "wandb").glob("offline-run-*/*.wandb"))
