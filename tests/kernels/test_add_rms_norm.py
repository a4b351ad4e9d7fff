import pytest
import torch

from triptych_kernels import add_rms_norm, add_rms_norm_ref, rms_norm


def exact(x, residual, weight):
    summed = x + residual
    return weight * summed / (summed.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt(), summed


def joined(op):
    return lambda *tensors: torch.cat([y.flatten() for y in op(*tensors)])


def inputs(shape, dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(s).to(dtype) for s in (shape, shape, shape[-1:])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (63, 760), (2, 3, 5), (0, 8)])
def test_matches_the_formula(check, shape, dtype):
    check(joined(add_rms_norm), joined(exact), *inputs(shape, dtype))


@pytest.mark.parametrize("zero_centered", [False, True])
def test_gives_the_bits_of_the_two_steps(zero_centered):
    x, residual, weight = inputs((5, 32), torch.bfloat16)
    normed, summed = add_rms_norm(x, residual, weight, zero_centered=zero_centered)
    assert torch.equal(summed, x + residual)
    assert torch.equal(normed, rms_norm(x + residual, weight, zero_centered=zero_centered))


def test_gradcheck():
    tensors = [x.requires_grad_() for x in inputs((3, 5), torch.float64)]
    assert torch.autograd.gradcheck(add_rms_norm_ref, tensors)


def test_compiles_in_one_graph():
    tensors = inputs((3, 8))
    compiled = torch.compile(add_rms_norm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), add_rms_norm(*tensors))


def test_other_shapes_and_dtypes_are_refused():
    x, residual, weight = inputs((3, 8))
    with pytest.raises(ValueError, match="x and residual must have one shape and dtype"):
        add_rms_norm(x, residual.double(), weight)
    with pytest.raises(ValueError, match=r"add_rms_norm: weight must be \(8,\)"):
        add_rms_norm(x, residual, weight[1:])
