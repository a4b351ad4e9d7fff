import os
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
    assert dispatch._first_able(op, CUDA, dtype, width) == expected


def test_a_request_that_cannot_be_met_says_why():
    with pytest.raises(ValueError, match=r"backend=.*'triton'.*(CUDA|not installed)"):
        swiglu(X, X, backend="triton")


def test_an_unknown_backend_lists_the_known_ones():
    with pytest.raises(ValueError, match="one of triton, reference, torch, got 'cute'"):
        rms_norm(X, X[0], backend="cute")


def test_argument_beats_block_beats_environment(monkeypatch):
    monkeypatch.setenv(dispatch.ENVIRONMENT, "reference,linear_cross_entropy=chunked")
    assert dispatch._requested("swiglu", None) == ("reference", dispatch.ENVIRONMENT)
    assert dispatch._requested("linear_cross_entropy", None)[0] == "chunked"
    with use_backend(swiglu="triton"):
        assert dispatch._requested("swiglu", None) == ("triton", "use_backend")
        assert dispatch._requested("swiglu", "reference") == ("reference", "backend=")
        assert dispatch._requested("rms_norm", None) == ("reference", dispatch.ENVIRONMENT)


def test_the_inner_block_wins_and_both_end():
    with use_backend(swiglu="triton"):
        with use_backend("reference"):
            assert dispatch._requested("swiglu", None)[0] == "reference"
        assert dispatch._requested("swiglu", None)[0] == "triton"
    assert dispatch._requested("swiglu", None) == (None, "")


def test_an_unknown_op_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="use_backend: an op must be one of attention"):
        use_backend(rmsnorm="triton").__enter__()
    monkeypatch.setenv(dispatch.ENVIRONMENT, "rmsnorm=triton")
    with pytest.raises(ValueError, match=r"TRIPTYCH_KERNELS_BACKEND.*got 'rmsnorm'"):
        dispatch.choose("rms_norm", X)


def test_explain_gives_a_reason_for_every_backend():
    table = explain("cpu")
    for op, backends in dispatch.BACKENDS.items():
        for backend in backends:
            assert any(op in line and backend in line for line in table.splitlines())
    assert "needs a CUDA tensor, got cpu" in table
    assert table.count(" runs") == len(dispatch.BACKENDS)


def test_explain_shows_requests_that_fail():
    with use_backend(attention="varlen", swiglu="cute"):
        table = explain("cpu")
    assert "refused: needs a CUDA tensor, got cpu (asked by use_backend)" in table
    assert "refused: does not exist (asked by use_backend)" in table


def test_import_without_triton():
    code = "import sys; sys.modules['triton'] = None; import triptych_kernels as t; t.explain()"
    missing = "import importlib.util as u; f = u.find_spec; "
    missing += "u.find_spec = lambda n, *a: None if n == 'triton' else f(n, *a); "
    check = "; import torch; x = torch.ones(2, 8); t.rms_norm(x, x[0]); t.swiglu(x, x)"
    check += "; assert 'not installed' in t.explain('cuda')"
    run = subprocess.run(
        [sys.executable, "-c", missing + code + check],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
