"""`attention` with a window, a soft cap, other lengths of keys, and lse."""

import pytest
import torch

from triptych_kernels import attention, attention_ref
from triptych_kernels.attention_by_document import _attention, _attention_backward

LENGTHS = [[7], [5, 3, 9], [0, 1, 0, 6, 1, 0], [63, 1]]
CROSS = [([5, 3, 4], [2, 3, 9]), ([0, 4, 1], [3, 0, 6]), ([3], [0])]


def bounds(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def pack(lengths, lengths_k=None, dtype=torch.float32, heads=(4, 2), head_dim=16):
    generator = torch.Generator().manual_seed(0)
    num_queries, num_keys = sum(lengths), sum(lengths_k or lengths)
    shapes = [(num_queries, heads[0]), (num_keys, heads[1]), (num_keys, heads[1])]
    return [torch.randn(*shape, head_dim, generator=generator).to(dtype) for shape in shapes]


def exact_attention(
    q, k, v, cu_q, *, causal, scale=None, window=None, softcap=None, cu_k=None, lse=False
):
    """The formula over the whole row: every pair of a query and a key is shown or hidden."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[2] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    (document_q, place_q), (document_k, place_k) = (
        places(cu) for cu in (cu_q, cu_q if cu_k is None else cu_k)
    )
    distance = place_q[:, None] - place_k
    shown = document_q[:, None] == document_k
    if causal:
        shown &= distance >= 0
    if window is not None:
        shown &= distance.abs() < window
    scores = scores.masked_fill(~shown, -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    return scores.logsumexp(-1) if lse else torch.einsum("hqk,khd->qhd", weights, v)


def places(cu_seqlens):
    """-> of each token its document, and its distance to the document's end, negative."""
    lengths = cu_seqlens.diff()
    document = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return document, torch.arange(int(cu_seqlens[-1])) - cu_seqlens[1:][document]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("settings", [{"window": 1}, {"window": 4, "softcap": 0.7}, {"softcap": 2}])
def test_window_and_softcap(check, settings, lengths, causal, dtype):
    cu_seqlens = bounds(lengths)
    check(
        lambda *qkv: attention(*qkv, cu_seqlens, 256, causal=causal, **settings),
        lambda *qkv: exact_attention(*qkv, cu_seqlens, causal=causal, **settings),
        *pack(lengths, dtype=dtype),
    )


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("settings", [{}, {"window": 2}, {"softcap": 1.5, "scale": 0.6}])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("lengths", "lengths_k"), CROSS)
def test_keys_of_other_lengths(check, lengths, lengths_k, causal, settings):
    cu_q, cu_k = bounds(lengths), bounds(lengths_k)

    def ours(*qkv, **more):
        return attention(*qkv, cu_q, 256, causal=causal, cu_seqlens_k=cu_k, **settings, **more)

    tensors = pack(lengths, lengths_k)
    check(
        ours,
        lambda *qkv: exact_attention(*qkv, cu_q, causal=causal, cu_k=cu_k, **settings),
        *tensors,
    )
    assert torch.equal(ours(*tensors), ours(*tensors, max_seqlen_k=max(lengths_k)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("settings", [{}, {"window": 2, "softcap": 1.5}])
@pytest.mark.parametrize("causal", [True, False])
def test_lse(settings, causal, dtype):
    lengths, lengths_k = [4, 0, 5], [2, 3, 9]
    cu_q, cu_k = bounds(lengths), bounds(lengths_k)
    tensors = [x.requires_grad_() for x in pack(lengths, lengths_k, dtype)]
    out, lse = attention(
        *tensors, cu_q, 256, causal=causal, cu_seqlens_k=cu_k, return_lse=True, **settings
    )
    exact = exact_attention(
        *(x.double() for x in tensors), cu_q, causal=causal, cu_k=cu_k, lse=True, **settings
    )
    assert out.dtype == dtype and lse.shape == (4, 9) and not lse.requires_grad
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(lse.double(), exact.detach(), rtol=1e-5, atol=1e-5)
    plain, again = attention_ref(
        *tensors, cu_q, 256, causal=causal, cu_seqlens_k=cu_k, return_lse=True, **settings
    )
    assert torch.equal(out, plain) and torch.equal(lse, again)


@pytest.mark.parametrize("settings", [{}, {"window": 2}, {"softcap": 0.8}])
def test_gradcheck(settings):
    tensors = [x.requires_grad_() for x in pack([3, 0, 2], [1, 2, 4], torch.float64, head_dim=3)]
    cu_q, cu_k = bounds([3, 0, 2]), bounds([1, 2, 4])
    assert torch.autograd.gradcheck(
        lambda *qkv: attention(*qkv, cu_q, 9, causal=True, cu_seqlens_k=cu_k, **settings), tensors
    )


@pytest.mark.parametrize(
    ("settings", "return_lse"), [({}, False), ({"window": 2, "softcap": 0.8, "scale": 0.4}, True)]
)
def test_opcheck(settings, return_lse):
    lengths, lengths_k = [3, 0, 2], [1, 2, 4]
    q, k, v = pack(lengths, lengths_k, torch.float64, head_dim=3)
    settings = [True, *(settings.get(name) for name in ("scale", "window", "softcap"))]
    pattern = [bounds(lengths), bounds(lengths_k), 3, 4, *settings]
    torch.library.opcheck(_attention_backward, (torch.ones_like(q), q, k, v, *pattern))
    tensors = [x.requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(_attention, (*tensors, *pattern, return_lse))
    assert torch.autograd.gradcheck(lambda *x: _attention(*x, *pattern, return_lse)[0], tensors)


@pytest.mark.parametrize("settings", [{}, {"window": 3, "softcap": 1.0}])
def test_compiles_in_one_graph(settings):
    cu_seqlens = bounds([5, 3])

    def layer(q, k, v):
        out, lse = attention(q, k, v, cu_seqlens, 256, causal=True, return_lse=True, **settings)
        plain = attention(q, k, v, cu_seqlens, 256, causal=True, **settings)
        return out * lse.T.unsqueeze(-1) + plain

    tensors = [x.requires_grad_() for x in pack([5, 3])]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), layer(*tensors))
    torch.testing.assert_close(
        torch.autograd.grad(compiled(*tensors).sum(), tensors),
        torch.autograd.grad(layer(*tensors).sum(), tensors),
    )


def test_recomputed_under_checkpointing_and_twice_the_same_bits():
    cu_seqlens, tensors = bounds([5, 3]), [x.requires_grad_() for x in pack([5, 3])]

    def layer(*qkv):
        return attention(*qkv, cu_seqlens, 256, causal=True, window=3)

    def kept(*qkv):
        return torch.utils.checkpoint.checkpoint(layer, *qkv, use_reentrant=False)

    for first, second in zip(
        torch.autograd.grad(layer(*tensors).sum(), tensors),
        torch.autograd.grad(kept(*tensors).sum(), tensors),
        strict=True,
    ):
        assert torch.equal(first, second)


def test_wrong_values_are_refused():
    q, k, v = pack([5])
    cu = bounds([5])
    for settings, message in [
        ({"window": 0}, "window must be at least 1"),
        ({"softcap": 0.0}, "softcap must be above 0"),
        ({"max_seqlen_k": 5}, "max_seqlen_k must come with cu_seqlens_k"),
        ({"cu_seqlens_k": bounds([3, 2])}, "cu_seqlens_k must have the documents of cu_seqlens, 1"),
        ({"cu_seqlens_k": bounds([4])}, "cu_seqlens_k must rise from 0 to 5"),
        ({"cu_seqlens_k": cu, "max_seqlen_k": 4}, "max_seqlen_k must be at least the longest"),
    ]:
        with pytest.raises(ValueError, match=message):
            attention(q, k, v, cu, 256, causal=True, **settings)
    with pytest.raises(ValueError, match="give cu_seqlens_k where the keys are fewer"):
        attention(q, k[1:], v[1:], cu, 256, causal=True)
    with pytest.raises(ValueError, match="must have one dtype"):
        attention(q, k.double(), v, cu, 256, causal=True)
