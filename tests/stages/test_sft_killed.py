"""The SFT stage on a damaged shard, killed without warning and started again: nothing is lost."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.stages.test_sft import metrics, overrides, run_stage
from tests.tiny import make_model_dir, make_shards
from triptych_data.loader import PackLoader
from triptych_data.plan.ledger import audit, read_ledger
from triptych_data.shards.reader import Shards
from triptych_models.families import build_model

STEPS = 24
IMPORTED = (PackLoader, build_model)  # here, so that four forked ranks need not


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("killed")
    make_model_dir(path / "model")
    damage(make_shards(path / "train", 40, seed=1) / "shard-000002.tar")
    return path


def damage(tar: Path) -> None:
    """Flip a bit in the last image of a shard."""
    index = Shards.open([tar]).indexes[0]
    data = bytearray(tar.read_bytes())
    data[int(index.member_offset[-1] + index.member_size[-1] // 2)] ^= 1
    tar.write_bytes(data)


def train_apart(words: list[str]) -> None:
    """Two ranks in a process group of their own, to be killed together."""
    os.setsid()
    run_ranks(run_stage, 2, words)


def test_a_killed_and_resumed_run_loses_and_repeats_nothing(workspace):
    run_dir = workspace / "runs/killed"
    words = overrides(
        workspace,
        run_dir,
        f"run.steps={STEPS}",
        "checkpoint.every=4",
        "data.max_bad_rate=0.2",
        "data.num_workers=1",
        "evaluation.shards=[]",
        "export=false",
    )
    trainer = multiprocessing.get_context("fork").Process(target=train_apart, args=(words,))
    trainer.start()
    ledgers = [run_dir / f"ledger/rank-0000{rank}.jsonl" for rank in (0, 1)]
    for path in (run_dir / "metrics.jsonl", *ledgers):  # ranks may be a step apart
        killed_at = wait_for_line(path, 9, trainer)
    os.killpg(trainer.pid, signal.SIGKILL)
    trainer.join()
    before = [read_ledger(path) for path in ledgers]
    assert killed_at < STEPS and all(len(lines) >= 9 for lines in before)

    run_ranks(run_stage, 2, words)
    found = audit(run_dir / "ledger")
    assert found.problems == []
    assert (found.steps, found.left_out) == (STEPS, 0)
    assert found.holes in (found.epochs, found.epochs - 1) and found.epochs > 1
    state = json.loads((run_dir / f"checkpoints/step-0000{STEPS}/state.json").read_text())
    assert found.samples + found.holes == state["data"]["position"]
    assert [line["step"] for line in metrics(run_dir)] == list(range(1, STEPS + 1))
    assert sum(line["bad_samples"] for line in metrics(run_dir)) == found.holes
    # Steps taken twice, before the kill and after, took the same samples.
    for rank, lines in enumerate(before):
        after = read_ledger(ledgers[rank])
        assert lines == after[: len(lines)]


def wait_for_line(path: Path, step: int, trainer: multiprocessing.Process) -> int:
    """Wait until a step is on record; returns the last one that is."""
    deadline = time.monotonic() + 120
    while True:
        lines = path.read_text().splitlines() if path.exists() else []
        if len(lines) >= step:
            return len(lines)
        assert trainer.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
