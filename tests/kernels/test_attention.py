import pytest
import torch

from triptych_kernels import attention

# Lengths of the packed documents; 0 and 1 are allowed anywhere.
PACKS = [[7], [5, 3, 9], [0, 1, 0, 6, 1, 0], [1], [63, 1, 65]]


def pack(lengths, num_heads=4, num_kv_heads=2, head_dim=16, dtype=torch.float32):
    torch.manual_seed(0)
    num_tokens = sum(lengths)
    q = torch.randn(num_tokens, num_heads, head_dim, dtype=dtype)
    k = torch.randn(num_tokens, num_kv_heads, head_dim, dtype=dtype)
    v = torch.randn(num_tokens, num_kv_heads, head_dim, dtype=dtype)
    return q, k, v, cu_seqlens_of(lengths)


def cu_seqlens_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def exact_attention(q, k, v, cu_seqlens, causal, scale=None):
    """The formula over the whole row, with one mask that keeps documents apart."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scale = q.shape[2] ** -0.5 if scale is None else scale
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    lengths = cu_seqlens.diff()
    document = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    allowed = document[:, None] == document[None, :]
    if causal:
        allowed = allowed.tril()
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", PACKS)
def test_attention_matches_the_formula(check, lengths, causal, dtype):
    q, k, v, cu_seqlens = pack(lengths, dtype=dtype)
    check(
        lambda *qkv: attention(*qkv, cu_seqlens, 256, causal=causal),
        lambda *qkv: exact_attention(*qkv, cu_seqlens, causal),
        q,
        k,
        v,
    )


@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
def test_grouped_queries_and_scale(check, num_kv_heads):
    q, k, v, cu_seqlens = pack([5, 8], num_heads=6, num_kv_heads=num_kv_heads)
    check(
        lambda *qkv: attention(*qkv, cu_seqlens, 256, causal=True, scale=0.3),
        lambda *qkv: exact_attention(*qkv, cu_seqlens, True, scale=0.3),
        q,
        k,
        v,
    )


def test_views_of_one_projection(check):
    cu_seqlens = cu_seqlens_of([4, 7])
    qkv = torch.randn(11, 3 * 4 * 16, generator=torch.Generator().manual_seed(0))

    def on(op):
        return lambda x: op(*x.view(11, 3, 4, 16).unbind(1))

    check(
        on(lambda *qkv: attention(*qkv, cu_seqlens, 256, causal=False)),
        on(lambda *qkv: exact_attention(*qkv, cu_seqlens, False)),
        qkv,
    )


@pytest.mark.parametrize("causal", [True, False])
def test_a_document_is_bitwise_independent_of_the_others(causal):
    lengths = [6, 33, 9]
    q, k, v, cu_seqlens = pack(lengths)
    packed = run(q, k, v, cu_seqlens, causal)
    alone = run(*(x[6:39] for x in (q, k, v)), cu_seqlens_of([33]), causal)
    for got, want in zip(packed, alone, strict=True):
        assert torch.equal(got[6:39], want)


def run(q, k, v, cu_seqlens, causal):
    tensors = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = attention(*tensors, cu_seqlens, 256, causal=causal)
    return [out, *torch.autograd.grad(out.square().sum(), tensors)]


def test_gradcheck():
    q, k, v, cu_seqlens = pack([3, 0, 2], head_dim=8, dtype=torch.float64)
    tensors = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(
        lambda *qkv: attention(*qkv, cu_seqlens, 256, causal=True), tensors
    )


def test_autocast_takes_its_dtype_once_and_keeps_the_lse_float32():
    """A rope in float32 beside a plain projection, as under autocast, gives q, k, v two dtypes."""
    q, k, v, cu_seqlens = pack([5, 9])
    halves = [x.bfloat16() for x in (q, k, v)]
    for options in ({}, {"softcap": 5.0}):
        want = attention(*halves, cu_seqlens, 256, causal=True, **options)
        with torch.autocast("cpu", torch.bfloat16):
            got = attention(q, k, halves[2], cu_seqlens, 256, causal=True, **options)
        assert torch.equal(got, want)
    _, want = attention(*halves, cu_seqlens, 256, causal=True, return_lse=True)
    with torch.autocast("cpu", torch.bfloat16):
        _, lse = attention(q, k, v, cu_seqlens, 256, causal=True, return_lse=True)
        exact = attention(*(x.double() for x in (q, k, v)), cu_seqlens, 256, causal=True)
    assert lse.dtype == torch.float32 and torch.equal(lse, want) and exact.dtype == torch.float64


@pytest.mark.parametrize("bounds", [[0, 4], [1, 5], [0, 6, 5], [0]])
def test_cu_seqlens_must_cover_the_row(bounds):
    q, k, v, _ = pack([5])
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to 5"):
        attention(q, k, v, torch.tensor(bounds, dtype=torch.int32), 256, causal=True)


def test_max_seqlen_must_hold_the_longest_document():
    q, k, v, cu_seqlens = pack([5, 2])
    with pytest.raises(ValueError, match="the longest document, 5, got 4"):
        attention(q, k, v, cu_seqlens, 4, causal=True)


def test_shapes_and_dtypes_are_checked():
    q, k, v, cu_seqlens = pack([5], num_heads=4, num_kv_heads=3)
    with pytest.raises(ValueError, match="Hq a multiple of Hkv"):
        attention(q, k, v, cu_seqlens, 256, causal=True)
    q, k, v, cu_seqlens = pack([5])
    with pytest.raises(ValueError, match=r"\(num_docs \+ 1,\) int32, got \(2,\) torch.int64"):
        attention(q, k, v, cu_seqlens.long(), 256, causal=True)
