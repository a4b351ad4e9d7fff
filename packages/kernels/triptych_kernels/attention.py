"""Attention over packed documents: softmax(scale * q @ k.T + mask) @ v within each document.

With a soft cap c the scores s = scale * q @ k.T become c * tanh(s / c) (Gemma 2, arXiv
2408.00118). The fast backends are in flash_attention.py, the reference in attention_by_document.py.
"""

from collections.abc import Callable
from typing import Any, Literal, overload

from torch import Tensor

from . import flash_attention
from .attention_by_document import by_document
from .attention_pattern import Pattern, make_pattern
from .autocast import lowered
from .dispatch import FLASH4_WIDTHS, SHORT, WIDENED_LEN, choose

_Run = Callable[[Tensor, Tensor, Tensor, Pattern, bool], tuple[Tensor, Tensor | None]]

_BACKENDS: dict[str, _Run] = {
    "flash4": flash_attention.flash4,
    "varlen": flash_attention.varlen,
    "flash2": flash_attention.flash2,
    "sdpa": by_document,  # which is torch's function for what dispatch.py lets through
    "reference": by_document,
}


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    causal: bool,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    causal: bool,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    causal: bool,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend within each document of a packed row, and never across documents.

    q: (T, Hq, D); k and v: (T, Hkv, D) with Hq a multiple of Hkv (grouped queries); cu_seqlens:
    (num_docs + 1,) int32, rising from 0 to T, on q's device; documents of length 0 are allowed.
    max_seqlen: at least the longest document; round it up (to 256, say), since under torch.compile
    each new value recompiles. scale: 1/sqrt(D) by default. Returns out (T, Hq, D) in q's dtype.

    window: a query sees only the keys at a distance below `window`: to the left and its own when
    causal, to both sides otherwise. softcap: a bound c, through which scores become c *
    tanh(score / c). return_lse: also return lse (Hq, T) float32 (float64 for float64 q), the
    logarithm of each query's sum of exponentials, without a gradient.

    cu_seqlens_k, max_seqlen_k: of documents whose keys (Tk, Hkv, D) are fewer or more than their
    queries; the last query then stands beside the last key. Without max_seqlen_k, Tk stands in.
    A query that sees no key gives 0, and -inf in lse.

    Backends: varlen (torch.nn.attention.varlen), flash4 and flash2 (the packages flash-attn-4 and
    flash-attn), sdpa (scaled_dot_product_attention, one document after the other) and reference.
    Under torch.compile each is one node; flash2 has the package's own.

    Under autocast q, k and v are taken in its dtype, as scaled_dot_product_attention does. Raises
    ValueError for shapes and values that do not fit. sdpa and reference also check the
    values of cu_seqlens, which costs a synchronisation on CUDA; the others do not look at them.
    """
    q, k, v = lowered(q), lowered(k), lowered(v)
    pattern = make_pattern(
        q, k, v, cu_seqlens, max_seqlen, causal, scale, window, softcap, cu_seqlens_k, max_seqlen_k
    )
    asked = {
        "window": window is not None,
        "softcap": softcap is not None,
        "lse": return_lse,
        "key lengths": cu_seqlens_k is not None,
        # In this order: under torch.compile the length, once looked at, would part the graphs.
        SHORT: q.shape[-1] not in FLASH4_WIDTHS and max_seqlen < WIDENED_LEN,
    }
    name = choose("attention", q, backend, tuple(need for need in asked if asked[need]))
    out, lse = _BACKENDS[name](q, k, v, pattern, return_lse)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse.detach()


def attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    causal: bool,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = False,
) -> Any:
    """`attention` in plain torch, one document after the other.

    Each document is a call of its own, so that its output is bit for bit what it would be alone.
    """
    pattern = make_pattern(
        q, k, v, cu_seqlens, max_seqlen, causal, scale, window, softcap, cu_seqlens_k, max_seqlen_k
    )
    out, lse = by_document(q, k, v, pattern, return_lse)
    return (out, lse) if return_lse else out
