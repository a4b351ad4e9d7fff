"""What a call of `attention` asks for, checked."""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Pattern(NamedTuple):
    """Which keys a query sees, and what its scores go through; see `attention`."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor  # the same tensor where queries and keys have one length
    max_seqlen_q: int
    max_seqlen_k: int
    causal: bool
    scale: float | None
    window: int | None
    softcap: float | None

    def sides(self) -> tuple[int, int]:
        """How many keys to the left and to the right of its own a query sees; -1: all."""
        left = -1 if self.window is None else self.window - 1
        return left, 0 if self.causal else left


def make_pattern(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_k: int | None,
) -> Pattern:
    """The arguments of `attention` as a Pattern; raises ValueError for what does not fit."""
    _check_shapes(q, k, v, same_length=cu_seqlens_k is None)
    _check_cu_seqlens("cu_seqlens", cu_seqlens)
    if window is not None and window < 1:
        raise ValueError(
            f"attention: window must be at least 1, a query's own key, got {window}; "
            f"leave it out for no window"
        )
    if softcap is not None and softcap <= 0:
        raise ValueError(
            f"attention: softcap must be above 0, got {softcap}; leave it out for no cap"
        )
    if cu_seqlens_k is None:
        if max_seqlen_k is not None:
            raise ValueError(
                f"attention: max_seqlen_k must come with cu_seqlens_k, got {max_seqlen_k} alone; "
                f"give both, or neither"
            )
        return Pattern(
            cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, causal, scale, window, softcap
        )
    _check_cu_seqlens("cu_seqlens_k", cu_seqlens_k)
    if cu_seqlens_k.shape != cu_seqlens.shape:
        raise ValueError(
            f"attention: cu_seqlens_k must have the documents of cu_seqlens, "
            f"{cu_seqlens.shape[0] - 1}, got {cu_seqlens_k.shape[0] - 1}; a document without keys "
            f"has length 0"
        )
    longest = k.shape[0] if max_seqlen_k is None else max_seqlen_k
    return Pattern(cu_seqlens, cu_seqlens_k, max_seqlen, longest, causal, scale, window, softcap)


def lengths_of(bounds: list[int], num_tokens: int, max_seqlen: int, suffix: str) -> list[int]:
    """The documents' lengths; ValueError when the bounds do not cover the row."""
    lengths = [stop - start for start, stop in pairwise(bounds)]
    if not lengths or bounds[0] != 0 or bounds[-1] != num_tokens or min(lengths) < 0:
        raise ValueError(
            f"attention: cu_seqlens{suffix} must rise from 0 to {num_tokens}, the number of "
            f"tokens, got {bounds}; the padding tail must be a document too"
        )
    if max(lengths) > max_seqlen:
        raise ValueError(
            f"attention: max_seqlen{suffix} must be at least the longest document, "
            f"{max(lengths)}, got {max_seqlen}; the CUDA kernel would skip what lies beyond"
        )
    return lengths


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, same_length: bool) -> None:
    fits = (
        q.dim() == k.dim() == 3
        and k.shape == v.shape
        and (q.shape[0] == k.shape[0] or not same_length)
        and q.shape[2] == k.shape[2]
        and q.shape[1] % k.shape[1] == 0
    )
    if not fits:
        raise ValueError(
            f"attention: q must be (T, Hq, D) and k, v (T, Hkv, D) with Hq a multiple of Hkv, got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}; reshape them, or give "
            f"cu_seqlens_k where the keys are fewer or more than the queries"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"attention: q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}; "
            f"cast them"
        )


def _check_cu_seqlens(name: str, cu_seqlens: Tensor) -> None:
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32:
        raise ValueError(
            f"attention: {name} must be (num_docs + 1,) int32, got {tuple(cu_seqlens.shape)} "
            f"{cu_seqlens.dtype}; convert it once, where the batch is made"
        )
