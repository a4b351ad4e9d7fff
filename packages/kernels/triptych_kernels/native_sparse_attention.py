"""Native sparse attention over packed documents (arXiv 2502.11089): three views of the past.

    o_t = gate_1 compressed_t + gate_2 selected_t + gate_3 window_t

compressed attends to the means of whole blocks of keys and values; selected to the tokens of the
few blocks that the compressed scores favour; window to the last tokens. As in
flash-linear-attention, whose Triton kernels are the fla backend, the blocks of both branches are
the same and do not overlap, and a block's mean stands for the paper's learned compression.
"""

from typing import Any

import torch
from torch import Tensor

from .attention import attention
from .dispatch import choose, is_traced
from .documents import check_cu_seqlens
from .recompute import recomputed_gradients

_FORCED = 3  # the first block, the token's own and the one before it are always selected


def native_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    cu_seqlens: Tensor,
    *,
    block_size: int = 64,
    num_selected: int = 16,
    window: int = 512,
    scale: float | None = None,
    causal: bool = True,
    cu_seqlens_k: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attend within each document of a packed row, to parts of its past, or of all of it.

    q: (T, Hq, D); k: (T, Hkv, D) and v: (T, Hkv, Dv), Hq a multiple of Hkv; gates: (T, Hq, 3) for
    compressed, selected and window, say sigmoid of a projection; cu_seqlens: (num_docs + 1,) int32
    from 0 to T. Blocks of block_size tokens are counted from the start of each document. Of these
    num_selected, at least 3, are chosen for each token and key head: the first, the token's own,
    the one before, and those with the largest sum of compressed weights over the group's heads;
    no gradient flows through the choice. compressed sees the blocks that are complete at the token,
    and gives 0 before there is one; window sees the token and the window - 1 before it. scale:
    1/sqrt(D) by default. Returns (T, Hq, Dv) in q's dtype, computed in float32 (float64 for
    float64 q).

    Without causal all of a document is as its past: the window reaches to both sides. cu_seqlens_k:
    of documents whose keys (Tk, Hkv, D) are more than their queries; the last query then stands
    beside the last key.

    The reference holds the (Hq, L, L) scores of a document of L tokens and reads cu_seqlens on the
    host. fla needs CUDA, float16 or bfloat16, Hq / Hkv a power of two of at least 16, D = Dv a
    multiple of 8 and at most 256, and block_size a power of two of at least twice num_selected
    (rounded up to a power of two), and causal documents with as many keys as queries; it reads
    cu_seqlens on the host too. Under torch.compile the op
    is one node on both, and runs its forward a second time in the backward. Raises ValueError for
    shapes that do not fit.
    """
    _check_shapes(q, k, v, gates, block_size, num_selected, window, cu_seqlens_k is None)
    check_cu_seqlens("native_sparse_attention", cu_seqlens, q.shape[0])
    if cu_seqlens_k is not None:
        check_cu_seqlens("native_sparse_attention", cu_seqlens_k, k.shape[0])
    scale = q.shape[2] ** -0.5 if scale is None else scale
    why_not = _beyond_fla(q, k, v, block_size, num_selected)
    if not causal or cu_seqlens_k is not None:
        why_not = "needs causal documents with as many keys as queries"
    needs = (why_not,) if why_not else ()
    name = choose("native_sparse_attention", q, backend, needs)
    run = _native_sparse_attention if is_traced(q) else _run
    bounds = (cu_seqlens, cu_seqlens_k, causal)
    return run(q, k, v, gates, *bounds, block_size, num_selected, window, scale, name)


def native_sparse_attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    cu_seqlens: Tensor,
    *,
    block_size: int = 64,
    num_selected: int = 16,
    window: int = 512,
    scale: float | None = None,
    causal: bool = True,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor:
    """`native_sparse_attention` in plain torch, one document after the other."""
    scale = q.shape[2] ** -0.5 if scale is None else scale
    wide = torch.promote_types(q.dtype, torch.float32)
    lengths = cu_seqlens.diff().tolist()
    lengths_k = lengths if cu_seqlens_k is None else cu_seqlens_k.diff().tolist()
    q_, gates_ = (x.to(wide).split(lengths) for x in (q, gates))
    k_, v_ = (x.to(wide).split(lengths_k) for x in (k, v))
    documents = zip(q_, k_, v_, gates_, strict=True)
    with torch.autocast(q.device.type, enabled=False):
        out = [
            _document(*document, block_size, num_selected, window, scale, causal)
            for document in documents
        ]
    return torch.cat(out).to(q.dtype)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    block_size: int,
    num_selected: int,
    window: int,
    scale: float,
    name: str,
) -> Tensor:
    if name == "fla":
        return _call_fla(q, k, v, gates, cu_seqlens, block_size, num_selected, window, scale)
    return native_sparse_attention_ref(
        q,
        k,
        v,
        gates,
        cu_seqlens,
        block_size=block_size,
        num_selected=num_selected,
        window=window,
        scale=scale,
        causal=causal,
        cu_seqlens_k=cu_seqlens_k,
    )


def _document(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    block_size: int,
    num_selected: int,
    window: int,
    scale: float,
    causal: bool,
) -> Tensor:
    """One document, all in one wide dtype -> (L, Hq, Dv)."""
    group, num_keys = q.shape[1] // k.shape[1], k.shape[0]
    key = torch.arange(num_keys, device=q.device)
    own = key[num_keys - q.shape[0] :]  # beside each query
    last = own if causal else torch.full_like(own, num_keys - 1)  # that it sees
    block = torch.arange(-(-num_keys // block_size), device=q.device)
    # A block is visible to the compressed branch once its last token is.
    complete = (block + 1) * block_size <= last[:, None] + 1  # (L, C)
    k_mean, v_mean = _block_means(k, block_size), _block_means(v, block_size)
    weights = _weights(q, k_mean, complete, scale)  # (Hq, L, C)
    compressed = _mix(weights, v_mean)

    # The group's heads read the same tokens, so they choose their blocks together.
    favour = weights.detach().unflatten(0, (-1, group)).sum(1)  # (Hkv, L, C)
    chosen = _choose_blocks(favour, own // block_size, last // block_size, num_selected)
    seen = key <= last[:, None]
    of_chosen = chosen.repeat_interleave(block_size, -1)[..., :num_keys] & seen  # (Hkv, L, K)
    selected = _mix(_weights(q, k, of_chosen.repeat_interleave(group, 0), scale), v)

    recent = seen & ((key - own[:, None]).abs() < window)
    last = _mix(_weights(q, k, recent, scale), v)

    by_compressed, by_selected, by_window = gates.unsqueeze(-1).unbind(2)
    return by_compressed * compressed + by_selected * selected + by_window * last


def _block_means(x: Tensor, block_size: int) -> Tensor:
    """(L, H, D) -> (C, H, D); an incomplete last block is the mean of what is there."""
    blocks = [part.mean(0) for part in x.split(block_size)] if x.shape[0] else []
    return torch.stack(blocks) if blocks else x


def _weights(q: Tensor, k: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """Softmax over the allowed keys -> (Hq, L, K), a row of zeros where none is allowed."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    # exp after the mask, against the largest allowed score: rows without any stay 0 / 1.
    scores = scores.masked_fill(~allowed, -torch.inf)
    if not scores.shape[-1]:
        return scores
    top = scores.detach().amax(-1, keepdim=True)
    raised = (scores - top.masked_fill(top == -torch.inf, 0)).exp()
    total = raised.sum(-1, keepdim=True)
    return raised / total.masked_fill(total == 0, 1)


def _mix(weights: Tensor, v: Tensor) -> Tensor:
    """(Hq, L, K) of (K, Hkv, Dv) -> (L, Hq, Dv)."""
    v = v.repeat_interleave(weights.shape[0] // v.shape[1], 1)
    return torch.einsum("hqk,khd->qhd", weights, v)


def _choose_blocks(favour: Tensor, own: Tensor, last: Tensor, num_selected: int) -> Tensor:
    """(Hkv, L, C), the block of each token and the last it sees (L,) -> (Hkv, L, C) bool, at most
    num_selected each."""
    block = torch.arange(favour.shape[-1], device=favour.device)
    own, last = own[:, None], last[:, None]
    forced = (block == 0) | (block == own - 1) | (block == own)
    favour = favour.masked_fill(forced, torch.inf)
    favour = favour.masked_fill(block > last, -torch.inf)
    best = favour.topk(min(num_selected, favour.shape[-1]), dim=-1).indices
    chosen = torch.zeros_like(favour, dtype=torch.bool).scatter(-1, best, True)
    return chosen & (block <= last)


def _call_fla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    cu_seqlens: Tensor,
    block_size: int,
    num_selected: int,
    window: int,
    scale: float,
) -> Tensor:
    """fla for the two sparse branches; its window would need flash-attn."""
    from fla.ops.nsa import parallel_nsa

    by_compressed, by_selected, by_window = gates.unbind(2)
    sparse = parallel_nsa(
        *(x.unsqueeze(0) for x in (q, k, v)),
        g_cmp=by_compressed.unsqueeze(0),
        g_slc=by_selected.unsqueeze(0),
        block_counts=num_selected,
        block_size=block_size,
        scale=scale,
        cu_seqlens=cu_seqlens.unique_consecutive(),  # fla loses count at an empty document
    )
    recent = attention(q, k, v, cu_seqlens, q.shape[0], causal=True, window=window, scale=scale)
    return sparse.squeeze(0) + by_window.unsqueeze(-1) * recent


def _beyond_fla(q: Tensor, k: Tensor, v: Tensor, block_size: int, num_selected: int) -> str:
    """Why fla cannot take these; "" when it can."""
    group = q.shape[1] // k.shape[1]
    if group < 16 or group & (group - 1):
        return f"needs Hq / Hkv to be a power of two of at least 16, got {group}"
    if q.shape[2] % 8 or v.shape[2] != q.shape[2]:
        return f"needs D = Dv, a multiple of 8, got {q.shape[2]} and {v.shape[2]}"
    if block_size & (block_size - 1) or block_size < 2 << (num_selected - 1).bit_length():
        return (
            f"needs a block_size that is a power of two of at least twice num_selected, got "
            f"{block_size} and {num_selected}"
        )
    return "" if q.shape[0] else "needs at least one token, got 0"


def _check_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    block_size: int,
    num_selected: int,
    window: int,
    same_length: bool,
) -> None:
    fits = (
        q.dim() == k.dim() == v.dim() == 3
        and (q.shape[0] == k.shape[0] or not same_length)
        and k.shape[:2] == v.shape[:2]
        and q.shape[2] == k.shape[2]
        and q.shape[1] % k.shape[1] == 0
        and gates.shape == (*q.shape[:2], 3)
    )
    if not fits:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v, gates))
        raise ValueError(
            f"native_sparse_attention: q must be (T, Hq, D), k (T, Hkv, D), v (T, Hkv, Dv) with Hq "
            f"a multiple of Hkv, gates (T, Hq, 3), got {shapes}; reshape them"
        )
    if block_size < 1 or num_selected < _FORCED or window < 1:
        raise ValueError(
            f"native_sparse_attention: block_size and window must be at least 1 and num_selected "
            f"at least {_FORCED}, the blocks that are always selected, got {block_size}, {window} "
            f"and {num_selected}; raise them"
        )


@torch.library.custom_op("triptych::native_sparse_attention", mutates_args=())
def _native_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    block_size: int,
    num_selected: int,
    window: int,
    scale: float,
    name: str,
) -> Tensor:
    settings = (causal, block_size, num_selected, window, scale, name)
    return _run(q, k, v, gates, cu_seqlens, cu_seqlens_k, *settings).contiguous()


@_native_sparse_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *settings: Any) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2])


@torch.library.custom_op("triptych::native_sparse_attention_backward", mutates_args=())
def _native_sparse_attention_backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    block_size: int,
    num_selected: int,
    window: int,
    scale: float,
    name: str,
) -> list[Tensor]:
    """-> dq, dk, dv, dgates."""
    bounds = (cu_seqlens, cu_seqlens_k, causal)

    def forward(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
        return _run(q, k, v, gates, *bounds, block_size, num_selected, window, scale, name)

    return recomputed_gradients(forward, (q, k, v, gates), [dy])


@_native_sparse_attention_backward.register_fake
def _(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, *settings: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (q, k, v, gates)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.settings = inputs[6:]


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    gradients = _native_sparse_attention_backward(dy, *ctx.saved_tensors, *ctx.settings)
    return (*gradients, *[None] * 8)


_native_sparse_attention.register_autograd(_differentiate, setup_context=_save)
