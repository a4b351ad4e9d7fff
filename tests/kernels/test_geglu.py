import math

import pytest
import torch

from triptych_kernels import GeGLU, geglu, geglu_ref


def exact(gate, up, approximate):
    if approximate == "tanh":
        inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
        return gate * (1 + torch.tanh(inner)) / 2 * up
    return gate * (1 + torch.erf(gate / math.sqrt(2))) / 2 * up


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(1,), (63, 760), (2, 3, 5), (0, 8)])
def test_matches_the_formula(check, shape, dtype, approximate):
    torch.manual_seed(0)
    check(
        lambda g, u: geglu(g, u, approximate=approximate),
        lambda g, u: exact(g, u, approximate),
        torch.randn(shape).to(dtype),
        torch.randn(shape).to(dtype),
    )


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_gradcheck(approximate):
    gate, up = (torch.randn(3, 5).double().requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(lambda *x: geglu_ref(*x, approximate=approximate), (gate, up))


def test_compiles_in_one_graph():
    gate, up = torch.randn(3, 8), torch.randn(3, 8)
    compiled = torch.compile(geglu, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(gate, up), geglu(gate, up))


def test_module_is_the_feed_forward_block():
    module, x = GeGLU(8, 20, approximate="none"), torch.randn(2, 3, 8)
    assert list(module.state_dict()) == ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]
    hidden = torch.nn.functional.gelu(module.gate_proj(x)) * module.up_proj(x)
    assert torch.equal(module(x), module.down_proj(hidden))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="one shape and dtype"):
        geglu(torch.ones(2, 8), torch.ones(1, 8))
    with pytest.raises(ValueError, match="approximate must be 'none' or 'tanh', got 'erf'"):
        geglu(torch.ones(2), torch.ones(2), approximate="erf")
