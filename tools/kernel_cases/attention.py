"""Cases of attention over packed documents."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from .case import HALF, RAGGED, Case, bounds_of, randn


def attention_case(
    lengths: list[int], heads: int, kv_heads: int, head_dim: int, causal: bool, **options: float
) -> Case:
    from triptych_kernels import attention

    tokens = sum(lengths)
    cu_seqlens = bounds_of(lengths)
    max_seqlen = -(-max(lengths) // 256) * 256

    def on(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda q, k, v: op(q, k, v, cu_seqlens, max_seqlen, causal=causal, **options)

    more = "".join(f" {name}={value}" for name, value in options.items())
    return Case(
        "attention",
        f"{len(lengths)} docs T{tokens} {heads}/{kv_heads} D{head_dim} causal={causal}{more}",
        HALF,
        [
            randn(tokens, heads, head_dim),
            randn(tokens, kv_heads, head_dim, seed=1),
            randn(tokens, kv_heads, head_dim, seed=2),
        ],
        on(attention),
        on(plain_attention),
    )


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    causal: bool,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The formula in the dtype of q, document by document."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    out = []
    lengths = cu_seqlens.diff().tolist()
    for q_, k_, v_ in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q_, k_) * q.shape[2] ** -0.5
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        place = torch.arange(len(q_), device=q.device)
        ahead = place - place[:, None]
        hidden = ahead > 0 if causal else torch.zeros_like(ahead, dtype=torch.bool)
        if window is not None:
            hidden = hidden | (ahead.abs() >= window)
        scores = scores.masked_fill(hidden, -torch.inf)
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v_))
    return torch.cat(out)


def cases() -> Iterator[Case]:
    for lengths in (RAGGED, [1, 3], [1024]):
        for heads, kv_heads, head_dim in ((16, 8, 128), (4, 4, 64), (8, 1, 72), (2, 2, 80)):
            for causal in (True, False):
                yield attention_case(lengths, heads, kv_heads, head_dim, causal)
    for causal in (True, False):
        yield attention_case(RAGGED, 16, 8, 128, causal, window=100)
    yield attention_case(RAGGED, 16, 8, 128, True, softcap=30.0)


def timed() -> Iterator[Case]:
    """A row of documents; then of images in towers with narrow heads, beside the backend varlen."""
    from triptych_kernels import attention, attention_ref

    lengths = [1500, 400, 700, 1400, 1024, 100, 1800, 1268] * 2  # 16,384 tokens
    case = attention_case(lengths, 16, 8, 128, causal=True)
    bounds = bounds_of(lengths)
    yield replace(case, plain=lambda q, k, v: attention_ref(q, k, v, bounds, 2048, causal=True))
    for length, head_dim in ((4096, 72), (1024, 72), (256, 72), (64, 72), (4096, 80), (64, 80)):
        lengths = [length] * (16384 // length)
        varlen = partial(
            attention, cu_seqlens=bounds_of(lengths), max_seqlen=max(256, length), causal=False
        )
        case = attention_case(lengths, 16, 16, head_dim, causal=False)
        yield replace(case, plain=partial(varlen, backend="varlen"))
