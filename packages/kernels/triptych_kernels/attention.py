"""Attention over packed documents: softmax(scale * q @ k.T + mask) @ v within each document.

The varlen backend is torch.nn.attention.varlen (FlashAttention-2: Dao, arXiv 2307.08691).
"""

import inspect
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from .dispatch import choose

# torch 2.12 added the flag and checks it; 2.11 takes fewer key heads without being told.
_HAS_GQA_FLAG = "enable_gqa" in inspect.signature(varlen_attn).parameters


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    causal: bool,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attend within each document of a packed row, and never across documents.

    q: (T, Hq, D); k and v: (T, Hkv, D) with Hq a multiple of Hkv (grouped queries); cu_seqlens:
    (num_docs + 1,) int32, rising from 0 to T, on q's device; documents of length 0 are allowed.
    max_seqlen: at least the longest document; round it up (to 256, say), since under torch.compile
    each new value recompiles. scale: 1/sqrt(D) by default. Returns (T, Hq, D) in q's dtype.

    Raises ValueError for shapes that do not fit. The reference also checks the values of
    cu_seqlens, which costs a synchronisation on CUDA; varlen does not look at them.
    """
    _check_shapes(q, k, v, cu_seqlens)
    if choose("attention", q, backend) == "varlen":
        return _attention_varlen(q, k, v, cu_seqlens, max_seqlen, causal, scale)
    return attention_ref(q, k, v, cu_seqlens, max_seqlen, causal=causal, scale=scale)


def attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    causal: bool,
    scale: float | None = None,
) -> Tensor:
    """`attention`, one document after the other through torch's scaled_dot_product_attention.

    Each document is a call of its own, so that its output is bit for bit what it would be alone.
    """
    bounds = cu_seqlens.tolist()
    _check_bounds(bounds, q.shape[0], max_seqlen)
    lengths = [stop - start for start, stop in pairwise(bounds)]
    documents = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    return torch.cat([_attend(q_, k_, v_, causal, scale) for q_, k_, v_ in documents])


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> Tensor:
    """One document. q: (L, Hq, D), k and v: (L, Hkv, D) -> (L, Hq, D)."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # (1, heads, L, D)
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(
        q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped
    )  # (1, Hq, L, D)
    return out.squeeze(0).transpose(0, 1)


def _attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool,
    scale: float | None,
) -> Tensor:
    grouped: dict[str, Any] = (
        {"enable_gqa": True} if _HAS_GQA_FLAG and q.shape[1] != k.shape[1] else {}
    )
    out = varlen_attn(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        scale=scale,
        window_size=(-1, 0) if causal else (-1, -1),
        **grouped,
    )
    assert isinstance(out, Tensor)  # a tuple only comes when it is asked for more
    return out


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> None:
    fits = (
        q.dim() == k.dim() == 3
        and k.shape == v.shape
        and q.shape[0] == k.shape[0]
        and q.shape[2] == k.shape[2]
        and q.shape[1] % k.shape[1] == 0
    )
    if not fits:
        raise ValueError(
            f"attention: q must be (T, Hq, D) and k, v (T, Hkv, D) with Hq a multiple of Hkv, got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}; reshape them"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32:
        raise ValueError(
            f"attention: cu_seqlens must be (num_docs + 1,) int32, got {tuple(cu_seqlens.shape)} "
            f"{cu_seqlens.dtype}; convert it once, where the batch is made"
        )


def _check_bounds(bounds: list[int], num_tokens: int, max_seqlen: int) -> None:
    lengths = [stop - start for start, stop in pairwise(bounds)]
    if not lengths or bounds[0] != 0 or bounds[-1] != num_tokens or min(lengths) < 0:
        raise ValueError(
            f"attention: cu_seqlens must rise from 0 to {num_tokens}, the number of tokens, got "
            f"{bounds}; the padding tail must be a document too"
        )
    if max(lengths) > max_seqlen:
        raise ValueError(
            f"attention: max_seqlen must be at least the longest document, {max(lengths)}, got "
            f"{max_seqlen}; the CUDA kernel would skip what lies beyond"
        )
