import os
import re
import subprocess
import sys

import pytest
import torch

from triptych_kernels import dispatch, explain, rms_norm, swiglu, use_backend

X = torch.ones(2, 8)
CUDA = torch.device("cuda")


def test_cpu_tensors_take_the_reference():
    assert dispatch.choose("rms_norm", X) == "reference"
    assert dispatch.choose("linear_cross_entropy", X) == "chunked"


@pytest.mark.parametrize(
    ("op", "dtype", "width", "expected"),
    [
        ("attention", torch.bfloat16, 128, "varlen"),
        ("attention", torch.float32, 128, "sdpa"),
        ("attention", torch.bfloat16, 20, "sdpa"),
        ("swiglu", torch.float64, 128, "reference"),
        ("rms_norm", torch.bfloat16, 70000, "reference"),
    ],
)
def test_cuda_tensors_take_the_first_backend_that_fits(op, dtype, width, expected):
    assert dispatch.first_able(op, CUDA, dtype, width) == expected


def test_a_request_that_cannot_be_met_says_why():
    with pytest.raises(ValueError, match=r"backend=.*'triton'.*(CUDA|not installed)"):
        swiglu(X, X, backend="triton")


def test_an_unknown_backend_lists_the_known_ones():
    with pytest.raises(ValueError, match="one of triton, reference, torch, got 'cute'"):
        rms_norm(X, X[0], backend="cute")


def test_argument_beats_block_beats_environment(monkeypatch):
    monkeypatch.setenv(dispatch.ENVIRONMENT, "reference,linear_cross_entropy=chunked")
    assert dispatch.requested("swiglu", None) == ("reference", dispatch.ENVIRONMENT)
    assert dispatch.requested("linear_cross_entropy", None)[0] == "chunked"
    with use_backend(swiglu="triton"):
        assert dispatch.requested("swiglu", None) == ("triton", "use_backend")
        assert dispatch.requested("swiglu", "reference") == ("reference", "backend=")
        assert dispatch.requested("rms_norm", None) == ("reference", dispatch.ENVIRONMENT)


def test_the_inner_block_wins_and_both_end():
    with use_backend(swiglu="triton"):
        with use_backend("reference"):
            assert dispatch.requested("swiglu", None)[0] == "reference"
        assert dispatch.requested("swiglu", None)[0] == "triton"
    assert dispatch.requested("swiglu", None) == (None, "")


def test_an_unknown_op_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="use_backend: an op must be one of attention"):
        use_backend(rmsnorm="triton").__enter__()
    monkeypatch.setenv(dispatch.ENVIRONMENT, "rmsnorm=triton")
    with pytest.raises(ValueError, match=r"TRIPTYCH_KERNELS_BACKEND.*got 'rmsnorm'"):
        dispatch.choose("rms_norm", X)


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_explain_gives_a_reason_for_every_backend(device, dtype):
    lines = [line.split(maxsplit=2) for line in explain(device, dtype).splitlines()]
    states = {(line[0], line[1]): line[2] for line in lines if len(line) == 3}
    for op, backends in dispatch.BACKENDS.items():
        runs = [b for b in backends if states[op, b].startswith("runs")]
        assert runs == [dispatch.first_able(op, torch.device(device), dtype, 128)]
        for backend in set(backends) - set(runs):
            assert re.search("needs|could run|missing|not installed", states[op, backend])
    for op in ("route", "balance_loss", "z_loss", "expert_counts", "rope_tables"):
        assert states[op, "torch"] == "runs, on every device"


def test_explain_names_the_packages():
    table = explain("cpu")
    assert "needs a CUDA tensor, got cpu" in table
    for package in ("triton", "flash-attn-4", "flash-attn", "fla-core", "liger-kernel"):
        assert re.search(rf"^  {package} (is not installed|\d[\w.+]*): for ", table, re.M)


def test_explain_shows_requests_that_fail():
    with use_backend(attention="varlen", swiglu="cute"):
        table = explain("cpu")
    assert "refused: needs a CUDA tensor, got cpu (asked by use_backend)" in table
    assert "refused: does not exist (asked by use_backend)" in table


HIDDEN = """
import importlib.util, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else found(name, *rest)
sys.modules["triton"] = None
"""
USED = """
import torch
import triptych_kernels as tk
x = torch.ones(2, 8, requires_grad=True)
tk.rms_norm(x, x[0]).sum().backward()
tk.swiglu(x, x), tk.geglu(x, x), tk.layer_norm(x), tk.newton_schulz(x), tk.weighted_sum([x], [1.0])
tk.linear_cross_entropy(x, x, torch.tensor([0, 1])).backward()
assert "the package triton is not installed" in tk.explain("cuda")
assert tk.fuse(torch.nn.LayerNorm(8)).replaced
try:
    tk.swiglu(x, x, backend="triton")
except ValueError as error:
    assert "the package triton is not installed" in str(error)
else:
    raise AssertionError("an explicit request fell back")
"""


def run(code):
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_without_triton():
    run(HIDDEN + USED)


def test_import_brings_nothing_heavy_along():
    code = "import sys, torch; before = set(sys.modules); import triptych_kernels; "
    code += "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    code += "; print(sum(name.startswith('torch._dynamo') for name in sys.modules))"
    names, dynamo = run(code).splitlines()
    assert not set(names.split()) & {"triton", "transformers", "flash_attn", "fla", "liger_kernel"}
    assert dynamo == "0"
