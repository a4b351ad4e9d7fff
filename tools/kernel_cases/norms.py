"""Cases of the norms, all of one form: x (..., H) and tensors beside it."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .case import DTYPES, HALF, Case, randn

SHAPES = [(1, 64), (63, 760), (4099, 2048), (777, 16, 128), (50, 8192), (3, 65536), (0, 128)]


def norm_case(
    op: str, functions: tuple[Any, Any], shape: tuple[int, ...], dtype: torch.dtype, extra: int
) -> Case:
    """`extra` tensors of x's shape come before the weight; layer_norm's bias comes after it."""
    tensors = [randn(*shape, dtype=dtype, seed=i) for i in range(1 + extra)]
    tensors.append(1 + 0.2 * randn(shape[-1], dtype=dtype, seed=8))
    if op == "layer_norm":
        tensors.append(0.2 * randn(shape[-1], dtype=dtype, seed=9))
    return Case(op, f"{shape}", dtype, tensors, *functions)


def on_all(op: str, functions: tuple[Any, Any], extra: int = 0) -> Iterator[Case]:
    for dtype in DTYPES:
        for shape in SHAPES:
            yield norm_case(op, functions, shape, dtype, extra)


def rms_norm_cases() -> Iterator[Case]:
    from triptych_kernels import rms_norm, rms_norm_ref

    yield from on_all("rms_norm", (rms_norm, rms_norm_ref))
    yield Case(
        "rms_norm",
        "q of a fused qkv (777, 3, 8, 128)",
        HALF,
        [randn(777, 3, 8, 128), randn(128, seed=1)],
        lambda x, w: rms_norm(x[:, 0], w),
        lambda x, w: rms_norm_ref(x[:, 0], w),
    )
    yield Case(
        "rms_norm",
        "zero-centred (511, 2048)",
        HALF,
        [randn(511, 2048), 0.2 * randn(2048, seed=1)],
        lambda x, w: rms_norm(x, w, zero_centered=True),
        lambda x, w: rms_norm_ref(x, w, zero_centered=True),
    )


def rms_norm_timed() -> Iterator[Case]:
    from triptych_kernels import rms_norm, rms_norm_ref

    for shape in ((16384, 2048), (16384, 16, 128)):
        case = norm_case("rms_norm", (rms_norm, rms_norm_ref), shape, HALF, 0)
        yield replace(case, plain=lambda x, w: F.rms_norm(x, w.shape, w, 1e-6))


def add_rms_norm_cases() -> Iterator[Case]:
    from triptych_kernels import add_rms_norm, add_rms_norm_ref

    yield from on_all("add_rms_norm", (add_rms_norm, add_rms_norm_ref), extra=1)


def add_rms_norm_timed() -> Iterator[Case]:
    from triptych_kernels import add_rms_norm, add_rms_norm_ref

    yield norm_case("add_rms_norm", (add_rms_norm, add_rms_norm_ref), (16384, 2048), HALF, 1)


def gated_rms_norm_cases() -> Iterator[Case]:
    from triptych_kernels import gated_rms_norm, gated_rms_norm_ref

    yield from on_all("gated_rms_norm", (gated_rms_norm, gated_rms_norm_ref), extra=1)


def gated_rms_norm_timed() -> Iterator[Case]:
    from triptych_kernels import gated_rms_norm, gated_rms_norm_ref

    functions = (gated_rms_norm, gated_rms_norm_ref)
    yield norm_case("gated_rms_norm", functions, (16384, 32, 128), HALF, 1)


def layer_norm_with(backend: str | None) -> Callable[..., Tensor]:
    from triptych_kernels import layer_norm

    return lambda x, weight, bias: layer_norm(x, weight, bias, backend=backend)


def layer_norm_cases() -> Iterator[Case]:
    from triptych_kernels import layer_norm_ref

    for backend in (None, "triton"):
        for case in on_all("layer_norm", (layer_norm_with(backend), layer_norm_ref)):
            yield replace(case, what=f"{case.what} {backend or 'first choice'}")


def layer_norm_timed() -> Iterator[Case]:
    for backend in (None, "triton"):
        functions = (layer_norm_with(backend), lambda x, w, b: F.layer_norm(x, w.shape, w, b))
        case = norm_case("layer_norm", functions, (16384, 2048), HALF, 0)
        yield replace(case, what=f"{case.what} {backend or 'first choice'}")
