"""The reference of `attention`: plain torch, one document after the other."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention_pattern import Pattern, lengths_of
from .dispatch import is_traced


def by_document(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """q (Tq, Hq, D), k and v (Tk, Hkv, D) -> out (Tq, Hq, D), lse (Hq, Tq) when it is wanted.

    Without a cap, lse or differing lengths it is torch's scaled_dot_product_attention, otherwise
    the formula in float32 (float64 for float64 q), with all scores of a document at once.
    """
    if is_traced(q):  # while tracing, the documents' lengths are not known
        return _attention(q, k, v, *pattern, return_lse)
    return _run(q, k, v, pattern, return_lse)


def _run(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    lengths_q, lengths_k = _lengths(pattern, len(q), len(k))
    documents = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    with torch.autocast(q.device.type, enabled=False):
        parts = [_attend(*document, pattern, return_lse) for document in documents]
    out = torch.cat([out for out, _ in parts])
    return out, torch.cat([lse for _, lse in parts], dim=1) if return_lse else None


def _lengths(pattern: Pattern, num_queries: int, num_keys: int) -> tuple[list[int], list[int]]:
    bounds_q = bounds_k = pattern.cu_seqlens_q.tolist()
    if pattern.cu_seqlens_k is not pattern.cu_seqlens_q:
        bounds_k = pattern.cu_seqlens_k.tolist()
    lengths_q = lengths_of(bounds_q, num_queries, pattern.max_seqlen_q, "")
    return lengths_q, lengths_of(bounds_k, num_keys, pattern.max_seqlen_k, "_k")


def _attend_plainly(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
    """One document. q: (L, Hq, D), k and v: (L, Hkv, D) -> (L, Hq, D)."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # (1, heads, L, D)
    grouped, causal, visible = q.shape[1] != k.shape[1], pattern.causal, None
    if pattern.window is not None:
        visible, causal = ~_hidden(q.shape[2], q.shape[2], pattern, q.device), False
    out = F.scaled_dot_product_attention(
        q, k, v, visible, is_causal=causal, scale=pattern.scale, enable_gqa=grouped
    )  # (1, Hq, L, D)
    return out.squeeze(0).transpose(0, 1)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, return_lse: bool
) -> tuple[Tensor, Tensor]:
    """One document. q: (Lq, Hq, D), k and v: (Lk, Hkv, D) -> (Lq, Hq, D), lse (Hq, Lq)."""
    if pattern.softcap is None and not return_lse and len(q) == len(k):
        return _attend_plainly(q, k, v, pattern), _no_lse(q)
    weights, scores = _weights(q, k, pattern)
    out = torch.einsum("hgqk,khd->qhgd", weights, v.to(weights.dtype)).flatten(1, 2)
    return out.to(q.dtype), scores.detach().logsumexp(-1).flatten(0, 1)


def _weights(q: Tensor, k: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """-> softmax of the scores, and the scores, -inf where hidden: (Hkv, Hq / Hkv, Lq, Lk)."""
    scores = torch.einsum("qhgd,khd->hgqk", _grouped(q, k), k.to(_wide(q))) * _scale(q, pattern)
    if pattern.softcap is not None:
        scores = pattern.softcap * torch.tanh(scores / pattern.softcap)
    hidden = _hidden(len(q), len(k), pattern, q.device)
    scores = scores.masked_fill(hidden, -torch.inf)
    # Filled twice, for queries that see no key: the softmax of nothing but -inf is nan.
    return scores.softmax(-1).masked_fill(hidden, 0.0), scores


def _hidden(num_queries: int, num_keys: int, pattern: Pattern, device: torch.device) -> Tensor:
    """-> (Lq, Lk) bool, True where the query does not see the key."""
    left, right = pattern.sides()
    own = torch.arange(num_queries, device=device) + (num_keys - num_queries)  # beside each query
    distance = own[:, None] - torch.arange(num_keys, device=device)  # to the left
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if left >= 0:
        hidden |= distance > left
    if right >= 0:
        hidden |= -distance > right
    return hidden


def _differentiate_document(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern
) -> tuple[Tensor, Tensor, Tensor]:
    """One document. -> dq (Lq, Hq, D), dk and dv (Lk, Hkv, D)."""
    weights, scores = _weights(q, k, pattern)
    dout = _grouped(dout, k)
    d_weights = torch.einsum("qhgd,khd->hgqk", dout, v.to(dout.dtype))
    d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdim=True))
    if pattern.softcap is not None:
        capped = scores.masked_fill(scores == -torch.inf, 0.0) / pattern.softcap
        d_scores = d_scores * (1 - capped.square())
    d_scores = d_scores * _scale(q, pattern)
    dq = torch.einsum("hgqk,khd->qhgd", d_scores, k.to(dout.dtype)).flatten(1, 2)
    dk = torch.einsum("hgqk,qhgd->khd", d_scores, _grouped(q, k))
    dv = torch.einsum("hgqk,qhgd->khd", weights, dout)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _grouped(q: Tensor, k: Tensor) -> Tensor:
    """(L, Hq, D) -> (L, Hkv, Hq / Hkv, D), in the dtype of the arithmetic."""
    return q.unflatten(1, (k.shape[1], q.shape[1] // k.shape[1])).to(_wide(q))


def _wide(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _scale(q: Tensor, pattern: Pattern) -> float:
    return float(q.shape[-1] ** -0.5) if pattern.scale is None else pattern.scale


@torch.library.custom_op("triptych::attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """-> out (Tq, Hq, D), lse (Hq, Tq), which is (Hq, 0) when it is not wanted."""
    pattern = Pattern(
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, scale, window, softcap
    )
    out, lse = _run(q, k, v, pattern, return_lse)
    return out, _no_lse(q) if lse is None else lse


def _no_lse(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[1], 0, dtype=_wide(q))


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *pattern_and_lse: Any) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=_wide(q))
    return q.new_empty(q.shape), lse if pattern_and_lse[-1] else _no_lse(q)


@torch.library.custom_op("triptych::attention_backward", mutates_args=())
def _attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    pattern = Pattern(
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, scale, window, softcap
    )
    lengths_q, lengths_k = _lengths(pattern, len(q), len(k))
    documents = zip(
        dout.split(lengths_q),
        q.split(lengths_q),
        k.split(lengths_k),
        v.split(lengths_k),
        strict=True,
    )
    parts = [_differentiate_document(*document, pattern) for document in documents]
    dq, dk, dv = (torch.cat(part) for part in zip(*parts, strict=True))
    return dq, dk, dv


@_attention_backward.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *pattern: Any) -> tuple[Tensor, ...]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.settings = inputs[5:-1]
    ctx.save_for_backward(*inputs[:5])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, dout: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _attention_backward(dout, *ctx.saved_tensors, *ctx.settings)
    return (*gradients, *[None] * 9)


_attention.register_autograd(_differentiate, setup_context=_save)
