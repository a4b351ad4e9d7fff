"""Cases of the gated delta rule, its convolution, and native sparse attention.

The plain forms of rule and attention compute in float32 whatever the dtype, while the kernels
multiply in bfloat16: so the allowed error is a fixed one.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .case import HALF, RAGGED, Case, bounds_of, randn

SLACK = 1.5e-2


def delta_rule_case(lengths: list[int], heads: int, value_heads: int, width: int) -> Case:
    """The chunks of plain torch stand for the formula: token by token takes a launch for each."""
    from triptych_kernels import gated_delta_rule

    tokens, bounds = sum(lengths), bounds_of(lengths)
    options = {"cu_seqlens": bounds, "normalize_qk": True}
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
        lambda *x: gated_delta_rule(*x, **options, backend="chunked"),
        slack=SLACK,
    )


def delta_rule_cases() -> Iterator[Case]:
    """Of few shapes: for each, fla times its kernels' configurations anew, which takes longest."""
    yield delta_rule_case([0, 1, 63, 0, 130, 1], 2, 4, 128)


def delta_rule_timed() -> Iterator[Case]:
    yield delta_rule_case([1024] * 8, 16, 16, 128)


def conv_case(
    lengths: list[int], widths: tuple[int, ...], silu: bool, taps: int = 4, beside: int = 0
) -> Case:
    """y in parts of these widths; x has `beside` columns more on either side."""
    from triptych_kernels import causal_conv1d, causal_conv1d_ref

    tokens, bounds, total = sum(lengths), bounds_of(lengths), sum(widths)
    inner = slice(beside, beside + total)

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> object:
        return causal_conv1d(x[:, inner], weight, bounds, bias=bias, silu=silu, widths=widths)

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> object:
        y = causal_conv1d_ref(x[:, inner], weight, bounds, bias=bias, silu=silu)
        return y.split(widths, -1)

    return Case(
        "causal_conv1d",
        f"{len(lengths)} docs T{tokens} D{'+'.join(map(str, widths))} W{taps} silu={silu}",
        HALF,
        [
            randn(tokens, total + 2 * beside),
            randn(total, taps, seed=1, dtype=torch.float32),
            randn(total, seed=2, dtype=torch.float32),
        ],
        ours,
        plain,
    )


def conv_cases() -> Iterator[Case]:
    yield conv_case(RAGGED, (256, 256, 512), True)
    yield conv_case(RAGGED, (760,), False)
    yield conv_case(RAGGED, (37, 300), True, taps=3, beside=5)
    yield conv_case([1, 2, 3, 4, 5], (8,), True, taps=5)


def conv_timed() -> Iterator[Case]:
    yield conv_case([1024] * 16, (2048, 2048, 2048), True)


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
