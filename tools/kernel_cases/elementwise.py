"""Cases of gates, rotary embedding, modulation and the weighted sum."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .case import DTYPES, HALF, RAGGED, Case, bounds_of, randn


def gate_cases(op: str, ours: Any, plain: Any) -> Iterator[Case]:
    for dtype in DTYPES:
        for shape in ((1, 1), (63, 760), (2, 511, 6144), (0, 128)):
            inputs = [randn(*shape, dtype=dtype, seed=seed) for seed in range(2)]
            yield Case(op, f"{shape}", dtype, inputs, ours, plain)
    yield Case(
        op,
        "halves of (511, 2 * 3072)",
        HALF,
        [randn(511, 6144)],
        lambda x: ours(*x.chunk(2, dim=-1)),
        lambda x: plain(*x.chunk(2, dim=-1)),
    )


def gate_timed(op: str, ours: Any, plain: Any) -> Iterator[Case]:
    inputs = [randn(16384, 6144, seed=seed) for seed in range(2)]
    yield Case(op, "(16384, 6144)", HALF, inputs, ours, plain)


def swiglu_cases() -> Iterator[Case]:
    from triptych_kernels import swiglu, swiglu_ref

    yield from gate_cases("swiglu", swiglu, swiglu_ref)


def swiglu_timed() -> Iterator[Case]:
    from triptych_kernels import swiglu, swiglu_ref

    yield from gate_timed("swiglu", swiglu, swiglu_ref)


def geglu_cases() -> Iterator[Case]:
    from triptych_kernels import geglu, geglu_ref

    yield from gate_cases("geglu", geglu, geglu_ref)
    for case in gate_cases("geglu", geglu, geglu_ref):
        if len(case.tensors) == 2:
            yield replace(
                case,
                what=f"{case.what} exact",
                ours=lambda gate, up: geglu(gate, up, approximate="none"),
                plain=lambda gate, up: geglu_ref(gate, up, approximate="none"),
            )


def geglu_timed() -> Iterator[Case]:
    from triptych_kernels import geglu, geglu_ref

    yield from gate_timed("geglu", geglu, geglu_ref)


def rope_case(
    tokens: int, heads: int, kv_heads: int, head_dim: int, rotary_dim: int, dtype: torch.dtype
) -> Case:
    from triptych_kernels import apply_rope, apply_rope_ref

    angles = torch.arange(tokens, device="cuda")[:, None] * torch.logspace(
        0, -4, rotary_dim // 2, device="cuda"
    )
    tables = (angles.cos(), angles.sin())

    def on(op: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
        def call(qk: Tensor) -> tuple[Tensor, Tensor]:
            q, k = qk.split([heads, kv_heads], dim=1)  # views of one projection
            return op(q, k, *tables, rotary_dim=rotary_dim)

        return call

    what = f"T{tokens} {heads}/{kv_heads} D{head_dim} R{rotary_dim}"
    tensors = [randn(tokens, heads + kv_heads, head_dim, dtype=dtype)]
    return Case("rope", what, dtype, tensors, on(apply_rope), on(apply_rope_ref))


def rope_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for shape in ((1, 1, 1, 2, 2), (777, 16, 8, 128, 128), (63, 6, 2, 72, 24), (0, 4, 4, 8, 8)):
            yield rope_case(*shape, dtype)


def rope_timed() -> Iterator[Case]:
    yield rope_case(16384, 16, 8, 128, 128, HALF)


def modulate_cases() -> Iterator[Case]:
    from triptych_kernels import modulate, modulate_ref

    yield from conditioned("modulate", modulate, modulate_ref, conditions=2)


def modulate_timed() -> Iterator[Case]:
    from triptych_kernels import modulate, modulate_ref

    tensors = [randn(8, 4096, 3072), randn(8, 3072, seed=1), randn(8, 3072, seed=2)]
    yield Case("modulate", "(8, 4096, 3072)", HALF, tensors, modulate, modulate_ref)


def gate_add_cases() -> Iterator[Case]:
    from triptych_kernels import gate_add, gate_add_ref

    for case in conditioned("gate_add", gate_add, gate_add_ref, conditions=1):
        x = case.tensors[0]
        yield replace(case, tensors=[randn(*x.shape, dtype=x.dtype, seed=9), *case.tensors])


def gate_add_timed() -> Iterator[Case]:
    from triptych_kernels import gate_add, gate_add_ref

    tensors = [randn(8, 4096, 3072), randn(8, 4096, 3072, seed=1), randn(8, 3072, seed=2)]
    yield Case("gate_add", "(8, 4096, 3072)", HALF, tensors, gate_add, gate_add_ref)


def conditioned(op: str, ours: Any, plain: Any, conditions: int) -> Iterator[Case]:
    """x with one row of conditioning per sample, then per document of a packed row."""
    for dtype in DTYPES:
        for shape in ((2, 63, 760), (3, 511, 1152), (1, 1, 8), (2, 0, 64)):
            rows = [randn(shape[0], shape[2], dtype=dtype, seed=1 + i) for i in range(conditions)]
            yield Case(op, f"{shape}", dtype, [randn(*shape, dtype=dtype), *rows], ours, plain)
        bounds = bounds_of(RAGGED)
        rows = [randn(len(RAGGED), 760, dtype=dtype, seed=1 + i) for i in range(conditions)]
        yield Case(
            op,
            f"{len(RAGGED)} docs T{sum(RAGGED)} H760",
            dtype,
            [randn(sum(RAGGED), 760, dtype=dtype), *rows],
            lambda *x, bounds=bounds: ours(*x, cu_seqlens=bounds),
            lambda *x, bounds=bounds: plain(*x, cu_seqlens=bounds),
        )


def weighted_sum_case(count: int, elements: int, dtype: torch.dtype) -> Case:
    from triptych_kernels import weighted_sum, weighted_sum_ref

    weights = [2 * (i + 1) / count / (count + 1) for i in range(count)]
    return Case(
        "weighted_sum",
        f"{count} of {elements}",
        dtype,
        [randn(elements, dtype=dtype, seed=seed) for seed in range(count)],
        lambda *tensors: weighted_sum(tensors, weights),
        lambda *tensors: weighted_sum_ref(tensors, weights),
        differentiable=False,
    )


def weighted_sum_cases() -> Iterator[Case]:
    for dtype in (*DTYPES, torch.float16):
        for count, elements in ((1, 7), (3, 100_003), (16, 4096), (70, 1000), (2, 0)):
            yield weighted_sum_case(count, elements, dtype)


def weighted_sum_timed() -> Iterator[Case]:
    yield weighted_sum_case(4, 2**26, HALF)
