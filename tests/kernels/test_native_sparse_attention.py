import pytest
import torch

from triptych_kernels import (
    native_sparse_attention,
    native_sparse_attention_ref,
    use_backend,
)
from triptych_kernels.native_sparse_attention import _beyond_fla

BLOCK, SELECTED, WINDOW = 4, 3, 5
OPTIONS = {"block_size": BLOCK, "num_selected": SELECTED, "window": WINDOW}
LENGTHS = [0, 1, 30, 0, 7, 4]
COMPRESSED, CHOSEN, RECENT = range(3)


def pack(lengths=LENGTHS, heads=4, kv_heads=2, width=8, value_width=6, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    num_tokens = sum(lengths)
    shapes = (heads, width), (kv_heads, width), (kv_heads, value_width), (heads, 3)
    tensors = [
        torch.randn(num_tokens, *shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in shapes
    ]
    return tensors, cu_seqlens_of(lengths)


def cu_seqlens_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def one_branch(gates, branch):
    only = torch.zeros_like(gates)
    only[..., branch] = 1
    return only


def dense(q, k, v, allowed):
    """Softmax over what `allowed` (heads, L, K) leaves; 0 where it leaves nothing."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[2] ** -0.5
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num()
    return torch.einsum("hqk,khd->qhd", weights, v), weights


def means(x):
    return torch.stack([part.mean(0) for part in x.split(BLOCK)])


def complete_blocks(length):
    """[t][c]: every token of block c is at or before t."""
    blocks = range(-(-length // BLOCK))
    return torch.tensor([[(c + 1) * BLOCK - 1 <= t for c in blocks] for t in range(length)])


def hand_compressed(q, k, v):
    return dense(q, means(k), means(v), complete_blocks(len(q)))[0]


def hand_chosen(q, k, v):
    """Which tokens are read is found with lists; then dense attention."""
    _, weights = dense(q.detach(), means(k.detach()), means(v), complete_blocks(len(q)))
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    allowed = torch.zeros(heads, len(q), len(q), dtype=torch.bool)
    for head in range(heads):
        shared = range(head // group * group, head // group * group + group)
        for t in range(len(q)):
            own = t // BLOCK
            blocks = {0, own, max(own - 1, 0)}
            score = {c: sum(float(weights[h, t, c]) for h in shared) for c in range(own)}
            for c in sorted(score, key=lambda c: -score[c]):
                if len(blocks) < SELECTED:
                    blocks.add(c)
            for c in blocks:
                allowed[head, t, c * BLOCK : min((c + 1) * BLOCK, t + 1)] = True
    return dense(q, k, v, allowed)[0]


def hand_recent(q, k, v):
    length = range(len(q))
    return dense(q, k, v, torch.tensor([[t - WINDOW < s <= t for s in length] for t in length]))[0]


HAND = {COMPRESSED: hand_compressed, CHOSEN: hand_chosen, RECENT: hand_recent}


def by_document(op, tensors, lengths):
    parts = zip(*(x.split([n for n in lengths if n]) for x in tensors), strict=True)
    return torch.cat([op(*part) for part in parts])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("branch", [COMPRESSED, CHOSEN, RECENT])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_each_branch_is_dense_attention_under_its_mask(check, kv_heads, branch, dtype):
    (q, k, v, gates), cu_seqlens = pack(kv_heads=kv_heads, dtype=dtype)
    only = one_branch(gates, branch)
    check(
        lambda *x: native_sparse_attention(*x, only.to(x[0].dtype), cu_seqlens, **OPTIONS),
        lambda *x: by_document(HAND[branch], x, LENGTHS),
        q,
        k,
        v,
    )


def test_more_selected_blocks_than_forced(monkeypatch):
    """With five blocks a token, two are free to go where the compressed scores are largest."""
    monkeypatch.setitem(globals(), "SELECTED", 5)
    (q, k, v, gates), cu_seqlens = pack([50])
    got = native_sparse_attention(
        q, k, v, one_branch(gates, CHOSEN), cu_seqlens, block_size=BLOCK, num_selected=5
    )
    torch.testing.assert_close(got, hand_chosen(q, k, v))
    fewer = native_sparse_attention(
        q, k, v, one_branch(gates, CHOSEN), cu_seqlens, block_size=BLOCK, num_selected=3
    )
    assert not torch.allclose(got, fewer)


def test_all_blocks_and_a_wide_window_are_full_attention():
    (q, k, v, gates), cu_seqlens = pack([30])
    full = dense(q, k, v, torch.ones(30, 30, dtype=torch.bool).tril())[0]
    for branch in (CHOSEN, RECENT):
        got = native_sparse_attention(
            q,
            k,
            v,
            one_branch(gates, branch),
            cu_seqlens,
            block_size=BLOCK,
            num_selected=8,
            window=30,
        )
        torch.testing.assert_close(got, full)


def test_gates_weigh_the_branches():
    (q, k, v, gates), cu_seqlens = pack(dtype=torch.float64)
    got = native_sparse_attention(q, k, v, gates, cu_seqlens, **OPTIONS)
    parts = [by_document(HAND[branch], (q, k, v), LENGTHS) for branch in range(3)]
    torch.testing.assert_close(got, sum(gates[..., i, None] * parts[i] for i in range(3)))


def test_bfloat16_is_float32_rounded_once():
    tensors, cu_seqlens = pack(dtype=torch.bfloat16)
    got = native_sparse_attention(*tensors, cu_seqlens, **OPTIONS)
    wide = native_sparse_attention(*(x.float() for x in tensors), cu_seqlens, **OPTIONS)
    assert torch.equal(got, wide.bfloat16())


def test_nothing_flows_back_in_time():
    tensors, cu_seqlens = pack([30])
    later = [x.clone() for x in tensors]
    for x in later:
        x[17:] = 9.0
    a, b = (native_sparse_attention(*x, cu_seqlens, **OPTIONS) for x in (tensors, later))
    assert torch.equal(a[:17], b[:17])


def test_documents_are_separate():
    tensors, cu_seqlens = pack()
    spoiled = [x.clone() for x in tensors]
    for x in spoiled:
        x[1:31] = float("nan")
    clean, other = (with_gradients(x, cu_seqlens) for x in (tensors, spoiled))
    alone = with_gradients([x[1:31] for x in tensors], cu_seqlens_of([30]))
    for got, want, single in zip(other, clean, alone, strict=True):
        assert torch.equal(got[:1], want[:1])
        assert torch.equal(got[31:], want[31:])
        assert torch.equal(want[1:31], single)


def with_gradients(tensors, cu_seqlens):
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    out = native_sparse_attention(*tensors, cu_seqlens, **OPTIONS)
    return [out, *torch.autograd.grad(out, tensors, torch.ones_like(out))]


def both_ways(length, keys):
    """The last queries of a document that sees all of itself, by each branch's mask."""
    blocks, own = -(-keys // BLOCK), range(keys - length, keys)
    seen = torch.tensor([[(c + 1) * BLOCK <= keys for c in range(blocks)]] * length)
    near = torch.tensor([[abs(t - s) < WINDOW for s in range(keys)] for t in own])

    def chosen(q, k, v):
        _, weights = dense(q.detach(), means(k.detach()), means(v), seen)
        group = q.shape[1] // k.shape[1]
        allowed = torch.zeros(q.shape[1], length, keys, dtype=torch.bool)
        for head in range(q.shape[1]):
            shared = range(head // group * group, head // group * group + group)
            for row, t in enumerate(own):
                picked = {0, t // BLOCK, max(t // BLOCK - 1, 0)}
                score = {c: sum(float(weights[h, row, c]) for h in shared) for c in range(blocks)}
                for c in sorted(score, key=lambda c: -score[c]):
                    if len(picked) < SELECTED:
                        picked.add(c)
                for c in picked:
                    allowed[head, row, c * BLOCK : (c + 1) * BLOCK] = True
        return dense(q, k, v, allowed)[0]

    return {
        COMPRESSED: lambda q, k, v: dense(q, means(k), means(v), seen)[0],
        CHOSEN: chosen,
        RECENT: lambda q, k, v: dense(q, k, v, near)[0],
    }


@pytest.mark.parametrize("branch", [COMPRESSED, CHOSEN, RECENT])
def test_a_document_may_see_all_of_itself(check, branch, monkeypatch):
    """And have more keys than queries: a part of it asks, behind what came before."""
    monkeypatch.setitem(globals(), "SELECTED", 4)
    queries, keys = [9, 5], [22, 5]
    (q, _, _, gates), cu_q = pack(queries)
    (_, k, v, _), cu_k = pack(keys)
    only = one_branch(gates, branch)
    settings = {"causal": False, "cu_seqlens_k": cu_k, **OPTIONS, "num_selected": 4}

    def by_hand(q, k, v):
        parts = zip(q.split(queries), k.split(keys), v.split(keys), queries, keys, strict=True)
        return torch.cat([both_ways(n, m)[branch](*x) for *x, n, m in parts])

    check(lambda *x: native_sparse_attention(*x, only, cu_q, **settings), by_hand, q, k, v)


def test_the_last_queries_of_a_causal_document_are_those_of_all_of_it():
    (q, k, v, gates), cu_seqlens = pack([30])
    whole = native_sparse_attention(q, k, v, gates, cu_seqlens, **OPTIONS)
    asked = native_sparse_attention(
        q[-7:], k, v, gates[-7:], cu_seqlens_of([7]), cu_seqlens_k=cu_seqlens, **OPTIONS
    )
    torch.testing.assert_close(asked, whole[-7:])


def test_gradcheck():
    tensors, cu_seqlens = pack([0, 1, 13], 2, 1, 2, 2, torch.float64)
    assert torch.autograd.gradcheck(
        lambda *x: native_sparse_attention_ref(
            *x, cu_seqlens, block_size=2, num_selected=3, window=3
        ),
        [x.requires_grad_() for x in tensors],
    )


def test_non_contiguous_inputs():
    (q, k, v, gates), cu_seqlens = pack()
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v, gates)]
    got = native_sparse_attention(*strided, cu_seqlens, **OPTIONS)
    assert torch.equal(got, native_sparse_attention(q, k, v, gates, cu_seqlens, **OPTIONS))


@pytest.mark.parametrize(
    ("heads", "block_size", "num_selected", "why_not"),
    [
        (16, 64, 16, ""),
        (16, 32, 17, "at least twice num_selected"),
        (16, 48, 16, "at least twice num_selected"),
        (24, 64, 16, "power of two of at least 16, got 24"),
        (8, 64, 16, "power of two of at least 16, got 8"),
    ],
)
def test_what_fla_takes(heads, block_size, num_selected, why_not):
    (q, k, v, _), _ = pack([9], heads=heads, kv_heads=1, value_width=8)
    reason = _beyond_fla(q, k, v, block_size, num_selected)
    assert (why_not in reason) if why_not else not reason


def test_shapes_are_checked():
    (q, k, v, gates), cu_seqlens = pack()
    with pytest.raises(ValueError, match="gates \\(T, Hq, 3\\)"):
        native_sparse_attention(q, k, v, gates[..., :2], cu_seqlens)
    with pytest.raises(ValueError, match="num_selected at least 3"):
        native_sparse_attention(q, k, v, gates, cu_seqlens, num_selected=2)
    with pytest.raises(ValueError, match="rise from 0"):
        native_sparse_attention(q, k, v, gates, cu_seqlens[:-1])
    with use_backend(native_sparse_attention="fla"), pytest.raises(ValueError, match="use_backend"):
        native_sparse_attention(q, k, v, gates, cu_seqlens)
