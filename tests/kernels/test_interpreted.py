"""The Triton code itself, on the CPU: in one process of its own, as Triton reads the flag early."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = [*sorted(HERE.glob("interpreted_*cases.py")), HERE / "test_every_op.py"]


def test_triton_kernels_under_the_interpreter():
    pytest.importorskip("triton")
    pytest.importorskip("numpy")  # the interpreter computes with it
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("this is an interpreting process already")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--no-header", *map(str, FILES)],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
