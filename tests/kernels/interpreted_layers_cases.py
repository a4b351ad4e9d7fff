"""The Triton kernels of the norms, gates, rope and modulation on the CPU, in float32.

Run by test_interpreted.py, or: TRITON_INTERPRET=1 pytest and this file's path.
A program takes milliseconds here, so the shapes are small.
"""

import pytest
import torch

from triptych_kernels import (
    add_rms_norm,
    add_rms_norm_ref,
    apply_rope,
    apply_rope_ref,
    explain,
    gate_add,
    gate_add_ref,
    gated_rms_norm,
    gated_rms_norm_ref,
    geglu,
    geglu_ref,
    layer_norm,
    layer_norm_ref,
    modulate,
    modulate_ref,
    rms_norm,
    rms_norm_ref,
    use_backend,
)
from triptych_kernels.triton_ops import gated_rms_norm as gated_kernels
from triptych_kernels.triton_ops import layer_norm as layer_norm_kernels
from triptych_kernels.triton_ops import rms_norm as rms_norm_kernels

pytestmark = pytest.mark.usefixtures("poison")

SHAPES = [(1, 1), (3, 76), (2, 5, 63), (0, 8)]
BOUNDS = torch.tensor([0, 0, 1, 7, 7, 9], dtype=torch.int32)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """A few rows a tile and two programs, so that there are partial sums to add."""
    for kernels in (rms_norm_kernels, gated_kernels, layer_norm_kernels):
        monkeypatch.setattr(kernels, "_TILE", 128)


@pytest.fixture(autouse=True)
def triton_layer_norm():
    with use_backend(layer_norm="triton"):
        yield


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def joined(op):
    """The op with its two outputs in one tensor."""
    return lambda *args, **named: torch.cat([x.flatten() for x in op(*args, **named)])


def test_float32_takes_the_kernels():
    table = explain("cpu", torch.float32)
    for op in ("add_rms_norm", "gated_rms_norm", "geglu", "rope", "modulate", "gate_add"):
        assert f"{op:<23} triton     runs" in table


@pytest.mark.parametrize("shape", SHAPES)
def test_zero_centered_rms_norm(check, shape):
    check(
        lambda x, w: rms_norm(x, w, zero_centered=True),
        lambda x, w: rms_norm_ref(x, w, zero_centered=True),
        randn(*shape),
        randn(shape[-1], seed=1),
    )


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm(check, shape, zero_centered):
    check(
        lambda *args: joined(add_rms_norm)(*args, zero_centered=zero_centered),
        lambda *args: joined(add_rms_norm_ref)(*args, zero_centered=zero_centered),
        randn(*shape),
        randn(*shape, seed=2),
        randn(shape[-1], seed=1),
    )


def test_add_rms_norm_of_views_and_of_one_output(check):
    def on(op):
        return lambda x, w: op(x[:, :20], x[:, 20:], w)[0] * 2

    check(on(add_rms_norm), on(add_rms_norm_ref), randn(5, 40), randn(20, seed=1))


@pytest.mark.parametrize("shape", SHAPES)
def test_gated_rms_norm(check, shape):
    tensors = (randn(*shape), randn(*shape, seed=2), randn(shape[-1], seed=1))
    check(gated_rms_norm, gated_rms_norm_ref, *tensors)


def test_gated_rms_norm_of_views(check):
    def on(op):
        return lambda x, w: op(x[:, ::2], x[:, 1::2].contiguous(), w)

    check(on(gated_rms_norm), on(gated_rms_norm_ref), randn(5, 40), randn(20, seed=1))


@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm(check, shape):
    weight, bias = randn(shape[-1], seed=1), randn(shape[-1], seed=2)
    x = randn(*shape) + 3 if shape[-1] > 1 else randn(*shape)
    check(layer_norm, layer_norm_ref, x, weight, bias)
    check(layer_norm, layer_norm_ref, x, weight)
    check(layer_norm, layer_norm_ref, x)
    check(lambda x, b: layer_norm(x, None, b), lambda x, b: layer_norm_ref(x, None, b), x, bias)


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("shape", [(1,), (3, 76), (0, 8), (1, 1025)])
def test_geglu(check, shape, approximate):
    check(
        lambda g, u: geglu(g, u, approximate=approximate),
        lambda g, u: geglu_ref(g, u, approximate=approximate),
        randn(*shape) * 3,
        randn(*shape, seed=1),
    )


@pytest.mark.parametrize(
    ("tokens", "q_heads", "k_heads", "head_dim", "rotary_dim"),
    [(3, 4, 2, 8, 8), (1, 1, 1, 2, 2), (2, 5, 3, 20, 12), (0, 2, 1, 8, 8), (2, 3, 0, 10, 6)],
)
def test_rope(check, tokens, q_heads, k_heads, head_dim, rotary_dim):
    cos, sin = (randn(tokens, rotary_dim // 2, seed=s) for s in (3, 4))

    def on(op):
        def run(q, k):
            tables = (x.to(q.dtype) for x in (cos, sin))
            return joined(op)(q, k, *tables, rotary_dim=rotary_dim)

        return run

    q, k = randn(tokens, q_heads, head_dim), randn(tokens, k_heads, head_dim, seed=1)
    check(on(apply_rope), on(apply_rope_ref), q, k)


def test_rope_of_many_heads_and_views_with_full_tables(check, monkeypatch):
    from triptych_kernels.triton_ops import rope as kernels

    monkeypatch.setattr(kernels, "_TILE", 8)
    kernels._tile.cache_clear()
    half = randn(3, 4, seed=3)
    cos, sin = torch.cat([half, half], -1), torch.cat([half, half], -1).T.contiguous().T

    def on(op):
        def run(qkv):
            q, k, _ = qkv.split([5, 3, 1], dim=1)
            return joined(op)(q, k, cos.to(q.dtype), sin.to(q.dtype))

        return run

    check(on(apply_rope), on(apply_rope_ref), randn(3, 9, 8))
    kernels._tile.cache_clear()


@pytest.mark.parametrize(
    ("x", "condition"),
    [
        ((2, 5, 12), (2, 12)),
        ((2, 5, 12), (2, 1, 12)),
        ((2, 3, 12), (2, 3, 12)),
        ((3, 300), (3, 300)),
        ((1, 9, 7), (1, 7)),
        ((2, 0, 7), (2, 7)),
    ],
)
def test_modulate_and_gate_add(check, x, condition):
    check(modulate, modulate_ref, randn(*x), *(randn(*condition, seed=s) for s in (1, 2)))
    check(gate_add, gate_add_ref, randn(*x), randn(*x, seed=1), randn(*condition, seed=2))


def test_modulate_and_gate_add_by_document(check):
    def on(op):
        return lambda *args: op(*args, cu_seqlens=BOUNDS)

    x, conditions = randn(9, 12), (randn(5, 12, seed=s) for s in (1, 2))
    check(on(modulate), on(modulate_ref), x, *conditions)
    check(on(gate_add), on(gate_add_ref), x, randn(9, 12, seed=3), randn(5, 12, seed=4))


def test_modulate_by_chunks_of_one_projection(check):
    def on(op):
        return lambda x, c: op(x[..., ::2], *c.chunk(2, dim=-1))

    check(on(modulate), on(modulate_ref), randn(2, 3, 20), randn(2, 20, seed=1))


def test_a_second_derivative_is_refused():
    x = randn(2, 4).requires_grad_()
    (first,) = torch.autograd.grad(geglu(x, x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="must not be differentiated"):
        first.sum().backward()
