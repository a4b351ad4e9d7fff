import pytest
import torch
import torch.nn.functional as F

from triptych_kernels import causal_conv1d, causal_conv1d_ref
from triptych_kernels.causal_conv1d import _causal_conv1d, _causal_conv1d_fla

LENGTHS = [5, 0, 1, 9, 2]


def cu_seqlens_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def exact_conv(x, weight, bias, lengths, silu):
    """torch's own convolution, document by document, with zeros before the first token."""
    out = []
    for part in x.split([n for n in lengths if n]):
        padded = F.pad(part.T, (weight.shape[1] - 1, 0))
        y = F.conv1d(padded[None], weight[:, None], bias, groups=x.shape[1])[0].T
        out.append(F.silu(y) if silu else y)
    return torch.cat(out)


def inputs(lengths=LENGTHS, width=6, taps=4):
    generator = torch.Generator().manual_seed(0)
    shapes = (sum(lengths), width), (width, taps), (width,)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("silu", [True, False])
def test_matches_convolution_per_document(check, silu, taps, dtype):
    check(
        lambda x, w, b: causal_conv1d(x, w, cu_seqlens_of(LENGTHS), bias=b, silu=silu),
        lambda x, w, b: exact_conv(x, w, b, LENGTHS, silu),
        *(x.to(dtype) for x in inputs(taps=taps)),
    )


def test_no_bias_and_no_tokens(check):
    x, weight, _ = inputs([0, 0])
    check(
        lambda x, w: causal_conv1d(x, w, cu_seqlens_of([0, 0])),
        lambda x, w: x + 0 * w.sum(),
        x,
        weight,
    )


def test_documents_do_not_meet():
    x, weight, _ = inputs()
    spoiled = x.clone()
    spoiled[6:15] = float("nan")
    clean, other = (causal_conv1d(y, weight, cu_seqlens_of(LENGTHS)) for y in (x, spoiled))
    assert torch.equal(clean[:6], other[:6])
    assert torch.equal(clean[15:], other[15:])


def test_gradcheck():
    tensors = [x.double().requires_grad_() for x in inputs()]
    assert torch.autograd.gradcheck(
        lambda x, w, b: causal_conv1d_ref(x, w, cu_seqlens_of(LENGTHS), bias=b, silu=True), tensors
    )


def test_non_contiguous_rows(check):
    x, weight, bias = inputs(width=12)
    check(
        lambda x, w, b: causal_conv1d(x[:, ::2], w[::2], cu_seqlens_of(LENGTHS), bias=b[::2]),
        lambda x, w, b: exact_conv(x[:, ::2], w[::2], b[::2], LENGTHS, False),
        x,
        weight,
        bias,
    )


def test_compiles_in_one_graph():
    x, weight, bias = inputs()
    cu_seqlens = cu_seqlens_of(LENGTHS)

    def op(x):
        return causal_conv1d(x, weight, cu_seqlens, bias=bias, silu=True)

    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), op(x))


@pytest.mark.parametrize("with_bias", [True, False])
def test_fla_op_has_the_shapes_it_promises(with_bias):
    """fla itself runs on CUDA; what torch.compile is told about it is checked here."""
    x, weight, bias = (t.to("meta").requires_grad_() for t in inputs())
    given = [x, weight, bias] if with_bias else [x, weight]
    cu_seqlens = cu_seqlens_of(LENGTHS).to("meta")
    y = _causal_conv1d_fla(x, weight, bias if with_bias else None, cu_seqlens, True)
    assert y.shape == x.shape
    gradients = torch.autograd.grad(y, given, y)
    assert [t.shape for t in gradients] == [t.shape for t in given]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_op_has_the_shapes_it_promises(dtype):
    """Its kernels run interpreted elsewhere; here also in bfloat16 under a float32 weight."""
    x, weight, bias = (t.to("meta").requires_grad_() for t in inputs())
    given = [x.detach().to(dtype).requires_grad_(), weight, bias]
    position = torch.zeros(len(x), dtype=torch.int64, device="meta")
    parts = _causal_conv1d(*given, position, True, [4, 2])
    assert [(y.shape, y.dtype) for y in parts] == [((17, 4), dtype), ((17, 2), dtype)]
    gradients = torch.autograd.grad(parts, given, parts)
    assert [(t.shape, t.dtype) for t in gradients] == [(t.shape, t.dtype) for t in given]


def test_parts_are_those_of_the_whole():
    x, weight, bias = inputs()
    whole = causal_conv1d(x, weight, cu_seqlens_of(LENGTHS), bias=bias)
    parts = causal_conv1d(x, weight, cu_seqlens_of(LENGTHS), bias=bias, widths=(1, 3, 2))
    assert [part.shape[1] for part in parts] == [1, 3, 2]
    assert torch.equal(torch.cat(parts, -1), whole)


def test_matches_transformers():
    module = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    x, weight, bias = inputs([15])
    want = module.causal_conv1d_fn(x.T[None], weight, bias, activation="silu")[0].T
    got = causal_conv1d(x, weight, cu_seqlens_of([15]), bias=bias, silu=True)
    torch.testing.assert_close(got, want)


def test_shapes_are_checked():
    x, weight, bias = inputs()
    cu_seqlens = cu_seqlens_of(LENGTHS)
    with pytest.raises(ValueError, match=r"weight \(D, W\)"):
        causal_conv1d(x, weight.T, cu_seqlens)
    with pytest.raises(ValueError, match="bias must be"):
        causal_conv1d(x, weight, cu_seqlens, bias=bias[:1])
    with pytest.raises(ValueError, match=r"int32 with at least one document, got \(1,\)"):
        causal_conv1d(x, weight, cu_seqlens[:1])
    with pytest.raises(ValueError, match=r"add up to 6, got \[3, 2\]"):
        causal_conv1d(x, weight, cu_seqlens, widths=(3, 2))
