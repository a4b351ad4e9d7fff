"""What every op promises, checked on all of them, on every backend that can run here.

The Triton kernels run under the interpreter: test_interpreted.py runs this file once more. What an
op computes is checked in its own file.
"""

import importlib.util
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

import triptych_kernels as tk
from triptych_kernels import dispatch, functional

spec = importlib.util.spec_from_file_location("op_cases", Path(__file__).with_name("op_cases.py"))
sys.modules["op_cases"] = op_cases = importlib.util.module_from_spec(spec)
spec.loader.exec_module(op_cases)
CASES = op_cases.CASES
INTERPRETS = dispatch._INTERPRETS
CPU = torch.device("cpu")


def able(case):
    """The backends that run float32 on this CPU; in the interpreter Triton's alone."""
    if not case.op:
        return [] if INTERPRETS else [None]
    reasons = dispatch.BACKENDS[case.op]
    names = [n for n in reasons if not reasons[n](CPU, torch.float32, 8) and n not in case.beyond]
    return [n for n in names if (n == "triton") == INTERPRETS]


RUNS = [
    pytest.param(name, backend, id=f"{name}, {backend}" if backend else name)
    for name, case in CASES.items()
    for backend in able(case)
]
on_every_backend = pytest.mark.parametrize(("name", "backend"), RUNS)


def make(name, backend, dtype=torch.float32, tokens=op_cases.TOKENS):
    """-> the op of these tensors alone, and the tensors, which require gradients if it has any."""
    case = CASES[name]
    options = {"backend": backend} if backend else {}
    tensors = case.tensors(dtype, tokens)
    if case.differentiable:
        tensors = [x.requires_grad_() for x in tensors]
    return lambda *x: case.ours(*x, **options), tensors


def outputs_and_gradients(op, tensors):
    """All outputs, then the gradients of a sum that weighs each output's elements differently."""
    outputs = [x for x in tree_leaves(op(*tensors)) if isinstance(x, torch.Tensor)]
    total = sum(
        (y * torch.arange(1, y.numel() + 1, device=y.device).view(y.shape).to(y.dtype)).sum()
        for y in outputs
        if y.requires_grad
    )
    if not isinstance(total, torch.Tensor):
        return outputs
    return [
        *(y.detach() for y in outputs),
        *torch.autograd.grad(total, tensors, materialize_grads=True),
    ]


@cache
def right(name, backend):
    """The op's own outputs and gradients, which most tests compare another way of calling with."""
    return outputs_and_gradients(*make(name, backend))


def assert_close(got, want):
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape and g.dtype == w.dtype
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5 * largest(w))


@on_every_backend
def test_compiles_in_one_graph(name, backend):
    torch._dynamo.reset()
    op, tensors = make(name, backend)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    assert_close(outputs_and_gradients(compiled, tensors), right(name, backend))


@on_every_backend
def test_fake_tensors_have_the_shapes_of_real_ones(name, backend):
    op, tensors = make(name, backend)
    want = right(name, backend)
    mode = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [mode.from_tensor(x.detach()).requires_grad_(x.requires_grad) for x in tensors]
    with mode:
        got = outputs_and_gradients(op, fakes)
    assert [(x.shape, x.dtype) for x in got] == [(x.shape, x.dtype) for x in want]
    assert all(isinstance(x, torch._subclasses.FakeTensor) for x in got)


@on_every_backend
def test_checkpointed_and_repeated_it_gives_the_same_bits(name, backend):
    op, tensors = make(name, backend)
    want = right(name, backend)
    again = outputs_and_gradients(op, tensors)
    recomputed = outputs_and_gradients(lambda *x: checkpoint(op, *x, use_reentrant=False), tensors)
    for got in (again, recomputed):
        assert len(got) == len(want) and all(map(torch.equal, got, want))


@on_every_backend
def test_takes_non_contiguous_tensors(name, backend):
    op, tensors = make(name, backend)
    want = right(name, backend)

    def spaced(x):  # every second element
        return torch.stack([x, x * 0], -1)[..., 0]

    def turned(x):  # the dimensions laid out from the last
        return x.transpose(0, -1).contiguous().transpose(0, -1)

    for lay in (spaced, turned):
        got = outputs_and_gradients(lambda *x, lay=lay: op(*map(lay, x)), tensors)
        assert_close(got, want)


@on_every_backend
def test_differentiated_twice_it_is_right_or_raises(name, backend):
    """Also where the gradient that reaches the op is a constant, as that of a loss is."""
    case = CASES[name]
    if not case.differentiable:
        pytest.skip("it has no gradient")
    op, tensors = make(name, backend)
    try:
        got = second_gradients(op, tensors)
    except RuntimeError as error:
        assert "differentiate" in str(error) or "not implemented" in str(error)  # sdpa's own
        return
    assert_close(got, second_gradients(case.plain, tensors))


def second_gradients(op, tensors):
    """Of a penalty on the gradients, beside a term that is differentiable anyway."""
    outputs = [x for x in tree_leaves(op(*tensors)) if isinstance(x, torch.Tensor)]
    total = sum(y.sum() for y in outputs if y.requires_grad)
    gradients = torch.autograd.grad(total, tensors, create_graph=True, materialize_grads=True)
    penalty = sum(g.square().sum() for g in gradients) + sum(x.sum() for x in tensors)
    return torch.autograd.grad(penalty, tensors)


@on_every_backend
@pytest.mark.usefixtures("poison")
def test_leaves_nothing_unwritten(name, backend):
    """torch.empty is filled with NaN here."""
    op, tensors = make(name, backend)
    assert all(x.isfinite().all() or "lse" in name for x in outputs_and_gradients(op, tensors))


@on_every_backend
@pytest.mark.usefixtures("poison")
def test_zero_rows(name, backend):
    op, tensors = make(name, backend, tokens=0)
    case, found = CASES[name], outputs_and_gradients(op, tensors)
    assert all(got.isfinite().all() for got in found)
    for x, gradient in zip(tensors, found[-len(tensors) :], strict=True):
        if case.differentiable:
            assert gradient.shape == x.shape and not gradient.any()


@on_every_backend
def test_under_autocast_it_is_near_float32(name, backend):
    if INTERPRETS:
        pytest.skip("the interpreter computes bfloat16 wrong")
    op, tensors = make(name, backend)
    want = right(name, backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = outputs_and_gradients(op, tensors)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.to(w.dtype), w, rtol=0.1, atol=0.05 * largest(w))


def largest(x):
    """The size of its largest finite element, at least 1."""
    seen = x[x.isfinite()].abs()
    return max(1.0, float(seen.max())) if seen.numel() else 1.0


@pytest.mark.parametrize("name", CASES)
def test_gradcheck_of_the_reference(name):
    case = CASES[name]
    if INTERPRETS or not case.differentiable:
        pytest.skip("it is run once, and only where there is a gradient")
    tensors = [x.requires_grad_() for x in case.tensors(torch.float64)]

    def first(*x):
        return [y for y in tree_leaves(case.plain(*x)) if y.requires_grad]

    if case.float64:
        assert torch.autograd.gradcheck(first, tensors, fast_mode=True)


@on_every_backend
def test_is_as_near_to_float64_as_plain_torch(name, backend):
    case = CASES[name]
    op, tensors = make(name, backend)
    got = [x for x in tree_leaves(op(*tensors)) if x.is_floating_point()]
    plain = [x for x in tree_leaves(case.plain(*tensors)) if x.is_floating_point()]
    exact = tree_leaves(case.plain(*(x.detach().double() for x in tensors)))
    for g, p, e in zip(got, plain, [x for x in exact if x.is_floating_point()], strict=True):
        seen = e.isfinite()
        assert torch.equal(g.isfinite(), seen)
        error, allowed = (float((x.detach().double() - e)[seen].norm()) for x in (g, p))
        assert error <= 2 * allowed + 3e-7 * float(e[seen].norm())


# The torch.library ops


class Recorder(TorchDispatchMode):
    """The arguments with which each op of this package was called."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "triptych":
            copies = tree_map_only(torch.Tensor, lambda x: x.detach().clone(), args)
            self.calls.setdefault(func, copies)
        return func(*args, **(kwargs or {}))


def recorded(name, backend, monkeypatch):
    """The calls that a forward and a backward of the op make while it is traced."""
    for module in list(sys.modules.values()):
        if module.__name__.startswith("triptych_kernels.") and hasattr(module, "is_traced"):
            monkeypatch.setattr(module, "is_traced", lambda x: True)
    op, tensors = make(name, backend)
    with Recorder() as recorder:
        outputs_and_gradients(op, tensors)
    return recorder.calls


@on_every_backend
def test_its_library_ops_pass_opcheck(name, backend, monkeypatch):
    calls = recorded(name, backend, monkeypatch)
    monkeypatch.undo()
    for op, args in calls.items():
        has_gradient = not op.name().endswith("_backward")
        if has_gradient and CASES[name].differentiable:
            args = tree_map_only(torch.Tensor, requiring_grad, args)
        torch.library.opcheck(op, args)


def requiring_grad(x):
    return x.requires_grad_() if x.is_floating_point() else x


# Of these every tensor that floats is marked above, also those that by their nature get none.
NODES_OF_CUDA = {"flash4", "flash4_backward"}  # test_attention_backends.py checks them


def test_no_library_op_is_left_out(monkeypatch):
    known = {n for n in torch._C._dispatch_get_all_op_names() if n.startswith("triptych::")}
    known = {n.removeprefix("triptych::") for n in known} - NODES_OF_CUDA
    called = set()
    for run in RUNS:
        name, backend = run.values
        called |= {
            op.name().removeprefix("triptych::") for op in recorded(name, backend, monkeypatch)
        }
        monkeypatch.undo()
    only_triton = {
        "add_rms_norm", "causal_conv1d", "gate_add", "gated_rms_norm", "geglu", "layer_norm",
        "modulate", "rms_norm", "rope", "swiglu", "symmetric_product",
    }  # fmt: skip
    only_fla = {"causal_conv1d_fla", "gated_delta_rule_fla"}
    only_fla |= {f"{n}_backward" for n in only_fla}
    triton = known & (only_triton | {f"{n}_backward" for n in only_triton})
    assert called >= triton if INTERPRETS else called == known - triton - only_fla


def test_every_exported_op_has_a_case():
    modules = {"Muon", "RMSNorm", "GatedRMSNorm", "LayerNorm", "SwiGLU", "GeGLU"}
    modules |= {"RotaryEmbedding", "AdaLayerNorm", "FuseReport"}
    others = {"explain", "fuse", "unfuse", "use_backend", "register_attention"}
    ops = {n for n in tk.__all__ if not n.endswith("_ref")} - modules - others
    assert ops == {name.split()[0] for name in CASES} == set(functional.__all__)
    assert all(getattr(functional, name) is getattr(tk, name) for name in ops)
    assert {case.op for case in CASES.values()} - {""} == set(dispatch.BACKENDS)


# Requests


@pytest.mark.parametrize(
    ("op", "backend"), [(op, b) for op, backends in dispatch.BACKENDS.items() for b in backends]
)
def test_a_request_runs_or_raises_and_never_falls_back(op, backend):
    case = next(case for case in CASES.values() if case.op == op)
    tensors = case.tensors()
    reason = dispatch.BACKENDS[op][backend](CPU, torch.float32, 8)
    with tk.use_backend(**{op: backend}):
        if not reason:
            case.ours(*tensors)
            assert dispatch.choose(op, tensors[0]) == backend
            return
        with pytest.raises(ValueError, match=f"use_backend.*{op}.*{backend}"):
            case.ours(*tensors)
    with pytest.raises(ValueError, match=f"backend=.*{op}.*{backend}"):
        case.ours(*tensors, backend=backend)
