"""Cases of the gated delta rule, its convolution, and native sparse attention.

Their plain forms compute in float32 whatever the dtype, while the kernels multiply in bfloat16: so
the allowed error is a fixed one.
"""

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

from .case import HALF, RAGGED, Case, bounds_of, randn

SLACK = 1.5e-2


def delta_rule_case(lengths: list[int], heads: int, value_heads: int, width: int) -> Case:
    from triptych_kernels import gated_delta_rule, gated_delta_rule_ref

    tokens, bounds = sum(lengths), bounds_of(lengths)
    plain = gated_delta_rule_ref if tokens <= 4096 else gated_delta_rule
    options = {"cu_seqlens": bounds, "normalize_qk": True}
    backend = {} if tokens <= 4096 else {"backend": "chunked"}
    return Case(
        "gated_delta_rule",
        f"{len(lengths)} docs T{tokens} {heads}/{value_heads} D{width}",
        HALF,
        [
            randn(tokens, heads, width),
            randn(tokens, heads, width, seed=1),
            randn(tokens, value_heads, width, seed=2),
            F.logsigmoid(randn(tokens, value_heads, seed=3).float() + 3).to(HALF),
            randn(tokens, value_heads, seed=4).sigmoid(),
        ],
        lambda *x: gated_delta_rule(*x, **options),
        lambda *x: plain(*x, **options, **backend),
        slack=SLACK,
    )


def delta_rule_cases() -> Iterator[Case]:
    yield delta_rule_case([0, 1, 63, 0, 130, 1], 2, 4, 64)
    yield delta_rule_case([200], 4, 4, 128)


def delta_rule_timed() -> Iterator[Case]:
    yield delta_rule_case([5000, 1384, 8000, 2000], 16, 32, 128)


def conv_case(lengths: list[int], width: int, silu: bool) -> Case:
    from triptych_kernels import causal_conv1d, causal_conv1d_ref

    bounds = bounds_of(lengths)
    return Case(
        "causal_conv1d",
        f"{len(lengths)} docs T{sum(lengths)} D{width} silu={silu}",
        HALF,
        [randn(sum(lengths), width), randn(width, 4, seed=1)],
        lambda x, weight: causal_conv1d(x, weight, bounds, silu=silu),
        lambda x, weight: causal_conv1d_ref(x, weight, bounds, silu=silu),
        slack=SLACK,
    )


def conv_cases() -> Iterator[Case]:
    for silu in (True, False):
        yield conv_case(RAGGED, 760, silu)


def conv_timed() -> Iterator[Case]:
    yield conv_case([5000, 1384, 8000, 2000], 8192, True)


def sparse_case(lengths: list[int], heads: int, kv_heads: int, width: int) -> Case:
    """All past blocks are selected: a choice between near ties would differ with the dtype."""
    from triptych_kernels import native_sparse_attention, native_sparse_attention_ref

    bounds, tokens = bounds_of(lengths), sum(lengths)
    options = {"cu_seqlens": bounds, "block_size": 64, "num_selected": 16, "window": 100}

    def gated(op: object) -> object:
        def call(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
            return op(q, k, v, gates.sigmoid(), **options)

        return call

    return Case(
        "native_sparse_attention",
        f"{len(lengths)} docs T{tokens} {heads}/{kv_heads} D{width}",
        HALF,
        [
            randn(tokens, heads, width),
            randn(tokens, kv_heads, width, seed=1),
            randn(tokens, kv_heads, width, seed=2),
            randn(tokens, heads, 3, seed=3),
        ],
        gated(native_sparse_attention),
        gated(native_sparse_attention_ref),
        slack=SLACK,
        waits=True,
    )


def sparse_cases() -> Iterator[Case]:
    yield sparse_case(RAGGED, 32, 2, 64)
    yield sparse_case([1000], 16, 1, 128)
    yield sparse_case(RAGGED, 8, 4, 64)


def sparse_timed() -> Iterator[Case]:
    yield sparse_case([1000, 500, 800], 32, 2, 128)
