import pytest
import torch

from triptych_kernels import RMSNorm, rms_norm, rms_norm_ref


def exact_rms_norm(x, weight, eps=1e-6):
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (63, 760), (2, 3, 5), (0, 8), (7, 1, 128)])
def test_matches_the_formula(check, shape, dtype):
    torch.manual_seed(0)
    check(rms_norm, exact_rms_norm, torch.randn(shape).to(dtype), torch.rand(shape[-1]).to(dtype))


def test_non_contiguous_inputs(check):
    torch.manual_seed(0)
    check(
        lambda x, w: rms_norm(x[:, ::2].transpose(0, 1), w),
        lambda x, w: exact_rms_norm(x[:, ::2].transpose(0, 1), w),
        torch.randn(5, 8, 16),
        torch.rand(16),
    )


def test_output_keeps_the_dtype_of_x_under_a_float32_weight():
    assert rms_norm(torch.ones(2, 8).bfloat16(), torch.ones(8)).dtype == torch.bfloat16


def test_gradcheck():
    x, weight = torch.randn(3, 5).double().requires_grad_(), torch.rand(5).double().requires_grad_()
    assert torch.autograd.gradcheck(rms_norm_ref, (x, weight))


def test_compiles_in_one_graph():
    x, weight = torch.randn(3, 8), torch.rand(8)
    compiled = torch.compile(rms_norm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight), rms_norm(x, weight))


def test_module_has_the_state_of_transformers():
    module = RMSNorm(8, eps=1e-5)
    assert {name: tuple(p.shape) for name, p in module.state_dict().items()} == {"weight": (8,)}
    x = torch.randn(2, 3, 8)
    assert torch.equal(module(x), rms_norm_ref(x, torch.ones(8), 1e-5))


def test_weight_of_another_width_is_refused():
    with pytest.raises(ValueError, match=r"weight must be \(8,\)"):
        rms_norm(torch.ones(2, 8), torch.ones(7))


def test_zero_centered_adds_one_to_the_weight_and_rounds_once(check):
    torch.manual_seed(0)
    x, weight = torch.randn(63, 76), torch.randn(76) * 0.1
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        check(
            lambda x, w: rms_norm(x, w, zero_centered=True),
            lambda x, w: exact_rms_norm(x, 1 + w),
            x.to(dtype),
            weight.to(dtype),
        )
    got = rms_norm(x.bfloat16(), weight, zero_centered=True)
    assert torch.equal(got, rms_norm(x.bfloat16().float(), 1 + weight).bfloat16())


def test_the_torch_backend_is_the_same_formula_rounded_once(check):
    torch.manual_seed(0)
    x, weight = torch.randn(63, 76), torch.rand(76)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        check(
            lambda x, w: rms_norm(x, w, backend="torch"),
            exact_rms_norm,
            x.to(dtype),
            weight.to(dtype),
        )
    with pytest.raises(ValueError, match="zero-centred norm"):
        rms_norm(x, weight, zero_centered=True, backend="torch")


def test_zero_centered_module_starts_as_the_plain_norm():
    x = torch.randn(2, 3, 8)
    module = RMSNorm(8, zero_centered=True)
    assert not module.weight.any()
    torch.testing.assert_close(module(x), RMSNorm(8)(x))
    normed, summed = module.add(x, x)
    assert torch.equal(summed, 2 * x) and torch.equal(normed, module(2 * x))
