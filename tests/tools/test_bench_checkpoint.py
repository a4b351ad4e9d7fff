"""The checkpoint benchmark runs, and what it reports adds up."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tests.ranks import run_ranks
from tests.tiny import ROOT


def bench(folder: Path, output: Path) -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    import bench_checkpoint

    with output.with_suffix(f".{os.environ['RANK']}").open("w") as sys.stdout:
        words = ["--billions", "0.0002", "--width", "64", "--tokens", "8", "--stage", "3"]
        bench_checkpoint.main([*words, "--folder", str(folder)], standalone_mode=False)
    sys.stdout = sys.__stdout__


def test_two_ranks_make_one_row(tmp_path):
    run_ranks(bench, 2, tmp_path / "run", tmp_path / "row")
    row = json.loads((tmp_path / "row.0").read_text().splitlines()[-1])
    assert (row["parameters"], row["ranks"], row["stage"]) == (49 * 64 * 64, 2, 3)
    assert 12 * row["parameters"] < row["gib"] * 2**30 < 13 * row["parameters"]
    assert len(row["stall_ms"]) == 3 and row["step_while_writing"] > 0
    assert row["as_of_the_save"]
    cost = row["share_of_100_steps"] * 100 * row["step_seconds"] * 1000  # of one save
    assert cost >= min(row["stall_ms"][1:])
