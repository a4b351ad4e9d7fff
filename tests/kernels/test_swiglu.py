import pytest
import torch

from triptych_kernels import SwiGLU, swiglu, swiglu_ref


def exact_swiglu(gate, up):
    return gate / (1 + torch.exp(-gate)) * up


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(1,), (63, 760), (2, 3, 5), (0, 8)])
def test_matches_the_formula(check, shape, dtype):
    torch.manual_seed(0)
    check(swiglu, exact_swiglu, torch.randn(shape).to(dtype), torch.randn(shape).to(dtype))


def test_two_halves_of_one_projection(check):
    torch.manual_seed(0)
    check(
        lambda x: swiglu(*x.chunk(2, dim=-1)),
        lambda x: exact_swiglu(*x.chunk(2, dim=-1)),
        torch.randn(3, 4, 34),
    )


def test_gradcheck():
    gate, up = (torch.randn(3, 5).double().requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(swiglu_ref, (gate, up))


def test_compiles_in_one_graph():
    gate, up = torch.randn(3, 8), torch.randn(3, 8)
    compiled = torch.compile(swiglu, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(gate, up), swiglu(gate, up))


def test_module_is_the_feed_forward_block():
    module, x = SwiGLU(8, 20), torch.randn(2, 3, 8)
    assert list(module.state_dict()) == ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]
    hidden = torch.nn.functional.silu(module.gate_proj(x)) * module.up_proj(x)
    assert torch.equal(module(x), module.down_proj(hidden))


def test_other_shapes_and_dtypes_are_refused():
    with pytest.raises(ValueError, match="one shape and dtype"):
        swiglu(torch.ones(2, 8), torch.ones(1, 8))
    with pytest.raises(ValueError, match="one shape and dtype"):
        swiglu(torch.ones(2), torch.ones(2).bfloat16())
