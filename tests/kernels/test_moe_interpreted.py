"""Runs interpreted_moe_cases.py in its own process: Triton reads TRITON_INTERPRET at import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("interpreted_moe_cases.py")


def test_triton_kernels_of_moe_under_the_interpreter():
    pytest.importorskip("triton")
    pytest.importorskip("numpy")  # the interpreter computes with it
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--no-header", str(CASES)],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
