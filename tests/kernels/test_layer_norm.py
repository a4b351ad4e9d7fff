import pytest
import torch

from triptych_kernels import LayerNorm, layer_norm, layer_norm_ref

BACKENDS = ["torch", "reference"]


def exact(x, weight=None, bias=None, eps=1e-5):
    centred = x - x.mean(-1, keepdim=True)
    y = centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(63, 760), (2, 3, 5), (1, 8), (0, 8)])
def test_matches_the_formula(check, shape, dtype, backend):
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(s).to(dtype) for s in (shape, shape[-1:], shape[-1:]))

    def ours(x, weight=None, bias=None):
        return layer_norm(x, weight, bias, backend=backend)

    check(ours, exact, x, weight, bias)
    check(ours, exact, x, weight)
    check(ours, exact, x)
    check(lambda x, b: ours(x, None, b), lambda x, b: exact(x, None, b), x, bias)


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_inputs(check, backend):
    torch.manual_seed(0)
    check(
        lambda x: layer_norm(x[:, ::2].transpose(0, 1), backend=backend),
        lambda x: exact(x[:, ::2].transpose(0, 1)),
        torch.randn(5, 8, 16),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_under_float32_parameters_is_rounded_once(backend):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(5, 64).bfloat16(), torch.randn(64), torch.randn(64)
    wanted = torch.nn.functional.layer_norm(x.float(), (64,), weight, bias)
    torch.testing.assert_close(layer_norm(x, weight, bias, backend=backend), wanted.bfloat16())


def test_gradcheck():
    torch.manual_seed(0)
    tensors = [torch.randn(s).double().requires_grad_() for s in ((3, 5), (5,), (5,))]
    assert torch.autograd.gradcheck(layer_norm_ref, tensors)


def test_compiles_in_one_graph():
    x, weight = torch.randn(3, 8), torch.rand(8)
    compiled = torch.compile(layer_norm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, weight), layer_norm(x, weight, weight))


def test_module_is_that_of_torch():
    module, x = LayerNorm(8, eps=1e-3), torch.randn(2, 3, 8)
    stock = torch.nn.LayerNorm(8, eps=1e-3)
    stock.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(x), stock(x))
    with pytest.raises(ValueError, match="must be one dimension"):
        LayerNorm((3, 8))(x)


def test_weight_and_bias_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"layer_norm: weight must be \(8,\)"):
        layer_norm(torch.ones(2, 8), torch.ones(7))
    with pytest.raises(ValueError, match=r"layer_norm: bias must be \(8,\)"):
        layer_norm(torch.ones(2, 8), None, torch.ones(7))
