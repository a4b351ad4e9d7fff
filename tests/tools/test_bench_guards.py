"""What the training benchmark calls guards is switched on, and off, and changes no loss."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tests.ranks import run_ranks
from tests.tiny import ROOT
from triptych_data.plan.ledger import audit

WORDS = [
    "--steps",
    "8",
    "--seq-len",
    "64",
    "--document-len",
    "16",
    "run.device=cpu",
    "model.compile=none",
]


def bench(folder: Path) -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    import bench_train

    variant = ("zero0_unguarded", "zero0_guarded")[int(os.environ.pop("RANK"))]
    for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        os.environ.pop(name)  # each of the two a run of its own
    (folder / variant).mkdir()
    bench_train.main(
        [str(folder / "model"), str(folder), "--one", variant, *WORDS], standalone_mode=False
    )


def test_guards_of_the_benchmark(tmp_path):
    config = json.loads((ROOT / "stages/configs/qwen3_tiny/config.json").read_text())
    config |= {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2, "hidden_size": 32}
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    run_ranks(bench, 2, tmp_path)
    off, on = tmp_path / "zero0_unguarded", tmp_path / "zero0_guarded"
    losses = [
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").open()] for run in (off, on)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 8
    found = audit(on / "ledger")
    assert (found.steps, found.samples, found.problems) == (8, 32, [])
    assert not (off / "ledger").exists() and not (off / "skipped.jsonl").exists()
