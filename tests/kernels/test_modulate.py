"""modulate and gate_add: the two halves of adaptive layer norm."""

import pytest
import torch

from triptych_kernels import AdaLayerNorm, gate_add, gate_add_ref, modulate, modulate_ref

BOUNDS = torch.tensor([0, 0, 1, 7, 7, 9], dtype=torch.int32)


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact_modulate(x, shift, scale):
    return x * (1 + scale) + shift


def exact_gate_add(residual, x, gate):
    return residual + gate * x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("x", "condition"),
    [((2, 5, 12), (2, 12)), ((2, 5, 12), (2, 1, 12)), ((2, 3, 12), (2, 3, 12)), ((7, 9), (7, 9))],
)
def test_matches_the_formula(check, x, condition, dtype):
    c, d = (randn(*condition, dtype=dtype, seed=s) for s in (1, 2))
    x, y = (randn(*x, dtype=dtype, seed=s) for s in (0, 3))
    check(modulate, lambda x, b, s: exact_modulate(x, wide_to(x, b), wide_to(x, s)), x, c, d)
    check(gate_add, lambda r, x, g: exact_gate_add(r, x, wide_to(x, g)), y, x, c)


def wide_to(x, condition):
    return condition[:, None] if condition.ndim < x.ndim else condition


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_condition_per_document(check, dtype):
    document = torch.tensor([1, 2, 2, 2, 2, 2, 2, 4, 4])
    x, y = randn(9, 12, dtype=dtype), randn(9, 12, dtype=dtype, seed=1)
    c, d = (randn(5, 12, dtype=dtype, seed=s) for s in (2, 3))
    check(
        lambda *args: modulate(*args, cu_seqlens=BOUNDS),
        lambda x, b, s: exact_modulate(x, b[document], s[document]),
        *(x, c, d),
    )
    check(
        lambda *args: gate_add(*args, cu_seqlens=BOUNDS),
        lambda r, x, g: exact_gate_add(r, x, g[document]),
        *(y, x, c),
    )


def test_zero_tokens_give_zero_gradients_to_the_condition():
    x, c = randn(2, 0, 8), randn(2, 8).requires_grad_()
    (gradient,) = torch.autograd.grad(modulate(x, c, c).sum() + gate_add(x, x, c).sum(), c)
    assert not gradient.any()


def test_half_precision_tokens_under_a_float32_condition_are_rounded_once():
    x, c = randn(2, 5, 12, dtype=torch.bfloat16), randn(2, 12)
    wide = c[:, None]
    assert torch.equal(modulate(x, c, c), (x.float() * (1 + wide) + wide).bfloat16())
    assert torch.equal(gate_add(x, x, c), (x.float() + wide * x.float()).bfloat16())


def test_gradcheck():
    tensors = [x.requires_grad_() for x in (randn(4, 3).double(), *(randn(2, 3).double(),) * 2)]
    bounds = torch.tensor([0, 3, 4], dtype=torch.int32)
    tensors[2] = tensors[2].detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: modulate_ref(*x, cu_seqlens=bounds), tensors)
    assert torch.autograd.gradcheck(
        lambda x, g: gate_add_ref(x, x * 2, g, cu_seqlens=bounds), tensors[:2]
    )


def test_compiles_in_one_graph():
    def block(x, c):
        return gate_add(x, modulate(x, c, c, cu_seqlens=BOUNDS), c, cu_seqlens=BOUNDS)

    x, c = randn(9, 12), randn(5, 12, seed=1)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, c), block(x, c))


def test_the_module_is_the_identity_at_the_start_and_learns():
    module, x, condition = AdaLayerNorm(12, 6), randn(2, 5, 12), randn(2, 6)
    inside, gate = module.enter(x, condition)
    torch.testing.assert_close(inside, torch.nn.functional.layer_norm(x, (12,), eps=1e-6))
    assert torch.equal(module.leave(x, inside * 3, gate), x)
    module.leave(x, inside * 3, gate).square().sum().backward()
    assert module.linear.weight.grad[24:].any()


def test_what_does_not_fit_is_refused():
    x, c = randn(2, 5, 12), randn(2, 12)
    with pytest.raises(ValueError, match=r"scale must hold one row per sample.*\(3, 12\)"):
        modulate(x, c, randn(3, 12))
    with pytest.raises(ValueError, match=r"one dtype, got torch.float32 and torch.float64"):
        modulate(x, c, c.double())
    with pytest.raises(ValueError, match="gate_add: residual and x must have one shape"):
        gate_add(x[:1], x, c)
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to 5"):
        gate_add(x[0], x[0], c, cu_seqlens=torch.tensor([0, 3, 4], dtype=torch.int32))
