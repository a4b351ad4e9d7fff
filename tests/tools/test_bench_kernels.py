"""The kernel benchmark rehearses on a CPU: every op, its table, its CSV, its refusals."""

import csv
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.ranks import run_script

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools/bench_kernels.py"
no_device = pytest.mark.skipif(torch.cuda.is_available(), reason="the rehearsal is for a CPU")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], str, Path]:
    """All ops in a process that finds packages/kernels and nothing else of the repository."""
    out = tmp_path_factory.mktemp("bench")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "packages/kernels"),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    options = ("--provider", "eager", "--provider", "ours", "--provider", "liger", "--out", out)
    run = subprocess.run(
        [sys.executable, TOOL, *options], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    with (out / "kernels.csv").open() as file:
        return list(csv.DictReader(file)), run.stdout, out


def bench(*options: str) -> subprocess.CompletedProcess[str]:
    """The tool in a process of its own: after its backward passes no rank could be forked."""
    return run_script(TOOL, *options)


def test_every_op_has_a_row_for_eager_and_for_us(results):
    rows, _, _ = results
    ops = {
        *("linear_cross_entropy", "attention", "rms_norm", "add_rms_norm", "layer_norm", "swiglu"),
        *("geglu", "rope", "modulate", "moe", "newton_schulz", "weighted_sum"),
        *("adamw", "adamw_half_states"),
    }
    assert {row["op"] for row in rows} == ops
    for row in rows:
        if row["provider"] == "eager":
            assert float(row["wall"]) > 0
        if row["provider"] == "ours":
            assert row["wall"] or row["note"].startswith("not available")
        if row["provider"] == "liger":
            assert row["note"] == "needs CUDA"


def test_providers_compute_the_same(results):
    rows, _, _ = results
    distances = {
        (row["op"], row["provider"]): float(row["distance_from_eager"] or 0) for row in rows
    }
    # Newton-Schulz leaves singular values anywhere near 1, so its forms differ more.
    bound = {"newton_schulz": 0.1}
    assert all(value < bound.get(op, 1e-2) for (op, _), value in distances.items()), distances


def test_table_comes_last_and_plot_is_drawn(results):
    rows, printed, out = results
    assert printed.splitlines()[-len(rows) - 1].startswith("op ")
    assert printed.splitlines()[-1].startswith("weighted_sum")
    assert (out / "kernels.png").exists() == bool(importlib.util.find_spec("matplotlib"))


@no_device
def test_shapes_modes_and_ignored_share():
    run = bench(
        *("--op", "linear_cross_entropy", "--provider", "ours", "--mode", "bwd"),
        *("--shapes", "16x8x20", "--ignored", "0", "--ignored", "0.75"),
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()[-2:]
    assert "16x8x20 " in lines[0]
    assert "16x8x20 ignored 75%" in lines[1]
    assert all(" bwd " in line for line in lines)


@no_device
def test_compile_is_a_provider():
    run = bench("--op", "swiglu", "--provider", "compile", "--compile-backend", "aot_eager")
    assert run.returncode == 0, run.stderr
    assert "failed" not in run.stdout
    assert "compile" in run.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--shapes", "1x2"), "exactly one --op"),
        (("--op", "rms_norm", "--shapes", "1x2x3"), "must be rowsxwidth"),
        (("--op", "rms_norm", "--provider", "theirs"), "got theirs"),
    ],
)
def test_refusals(options, message):
    run = bench(*options)
    assert run.returncode == 2
    assert message in run.stderr
