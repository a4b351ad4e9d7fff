import pytest
import torch
import torch.nn.functional as F

from triptych_kernels import GatedRMSNorm, gated_rms_norm, gated_rms_norm_ref


def exact(x, gate, weight):
    normed = weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    return normed * gate / (1 + torch.exp(-gate))


def inputs(shape, dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(s).to(dtype) for s in (shape, shape, shape[-1:])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (63, 760), (2, 3, 5), (0, 8)])
def test_matches_the_formula(check, shape, dtype):
    check(gated_rms_norm, exact, *inputs(shape, dtype))


def test_non_contiguous_inputs(check):
    def on(op):
        return lambda x, w: op(x[:, ::2], x[:, 1::2], w)

    torch.manual_seed(0)
    check(on(gated_rms_norm), on(exact), torch.randn(5, 24), torch.rand(12))


def test_gate_stays_in_float32_and_the_output_keeps_the_dtype_of_x():
    x, gate, weight = inputs((4, 32), torch.bfloat16)
    y = gated_rms_norm(x, gate.float(), weight)
    scaled = gated_rms_norm(x, torch.full_like(gate, 100.0), weight) / 100.0
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), scaled.float() * F.silu(gate.float()), rtol=2e-2, atol=0)


def test_gradcheck():
    tensors = [x.requires_grad_() for x in inputs((3, 5), torch.float64)]
    assert torch.autograd.gradcheck(gated_rms_norm_ref, tensors)


def test_compiles_in_one_graph():
    tensors = inputs((3, 8))
    compiled = torch.compile(gated_rms_norm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), gated_rms_norm(*tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_module_gives_the_bits_of_qwen3_next(dtype):
    stock = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    theirs, ours = (
        cls(32, eps=1e-5).to(dtype) for cls in (stock.Qwen3NextRMSNormGated, GatedRMSNorm)
    )
    x, gate, weight = inputs((7, 32), dtype)
    theirs.weight.data.copy_(weight)
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours(x, gate), theirs(x, gate))


def test_other_shapes_are_refused():
    x, gate, weight = inputs((3, 8))
    with pytest.raises(ValueError, match="gate must have the shape of x"):
        gated_rms_norm(x, gate[:1], weight)
