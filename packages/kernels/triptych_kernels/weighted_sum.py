"""Weighted sum of several tensors: y = sum_i weights[i] * tensors[i], in one pass.

The average of checkpoints (Izmailov et al., arXiv 1803.05407; Wortsman et al., arXiv 2203.05482).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .autograd import first_order
from .dispatch import choose, is_traced

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_CHUNK = 1 << 18  # elements per thread on a CPU: the accumulator and one input stay in its cache


def weighted_sum(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Sum N tensors, each times its weight, reading every one of them once.

    tensors: N of one shape, dtype (float16, bfloat16 or float32) and device; weights: N numbers.
    Returns that shape in `dtype`, by default that of the tensors (or of `out`). `out` is written
    and returned; it may be one of the tensors. Non-contiguous tensors are copied first. On CUDA:
    one launch for any N, and no wait for the device.

    Half outputs are accumulated in float32, float32 outputs in float64, and rounded once. The
    result is within 1 ulp of the exact one, in any order of the tensors, unless the terms cancel:
    a half output that is smaller than N * 2^-15 of sum |weights[i] * tensors[i]| loses digits. So
    N equal tensors with weights 1/N give that tensor back bit for bit: always for float32, up to
    N = 16000 for bfloat16 and N = 4000 for float16.

    Raises ValueError naming the index of a tensor of another shape, dtype or device; also for no
    tensors, another number of weights, an `out` that does not fit, and, as in torch, an `out`
    together with tensors that require a gradient.
    """
    dtype = dtype or (tensors[0].dtype if out is None and len(tensors) else None)
    dtype = dtype or (out.dtype if out is not None else torch.float32)
    _check(tensors, weights, out, dtype)
    name = choose("weighted_sum", tensors[0][None], backend)  # [None]: a scalar has no last size
    weights = [float(w) for w in weights]
    if name == "reference":
        total = weighted_sum_ref(tensors, weights, dtype=dtype)
        return total if out is None else out.copy_(total)
    if is_traced(tensors[0]):
        total = _weighted_sum(list(tensors), weights, dtype, name)
        return total if out is None else out.copy_(total)
    if out is not None:
        return _into(name, tensors, weights, out)
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return _WeightedSum.apply(weights, dtype, name, *tensors)
    return _sum(name, tensors, weights, dtype)


def weighted_sum_ref(
    tensors: Sequence[Tensor], weights: Sequence[float], *, dtype: torch.dtype | None = None
) -> Tensor:
    """`weighted_sum` in plain torch, all in float64."""
    first, *others = (x.double() * w for x, w in zip(tensors, weights, strict=True))
    for term in others:
        first = first + term
    return first.to(dtype or tensors[0].dtype)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which an output of `dtype` is summed: the next wider one."""
    return torch.float64 if dtype == torch.float32 else torch.float32


def _sum(
    name: str, tensors: Sequence[Tensor], weights: Sequence[float], dtype: torch.dtype
) -> Tensor:
    out = torch.empty(tensors[0].shape, dtype=dtype, device=tensors[0].device)
    return _into(name, tensors, weights, out)


def _into(name: str, tensors: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> Tensor:
    # contiguous first: a reshape alone may be a view with gaps, which the kernel does not see
    flat = [x.detach().contiguous().view(-1) for x in tensors]
    total = out.view(-1) if out.is_contiguous() else out.new_empty(out.numel())
    if name == "triton":
        from .triton_ops import weighted_sum as kernels

        kernels.weighted_sum(flat, weights, total)
    else:
        _sum_in_chunks(flat, weights, total)
    return out if out.is_contiguous() else out.copy_(total.view(out.shape))


def _sum_in_chunks(flat: Sequence[Tensor], weights: Sequence[float], total: Tensor) -> None:
    """total (n,) = the sum over the tensors (n,), piece by piece so that a piece stays in cache."""
    size = total.numel() if total.is_cuda else _CHUNK * torch.get_num_threads()
    if not total.numel():
        return
    wide = torch.empty(
        min(size, total.numel()), dtype=accumulator_dtype(total.dtype), device=total.device
    )
    for start in range(0, total.numel(), size):
        piece = slice(start, min(start + size, total.numel()))
        partial = wide[: piece.stop - piece.start]
        partial.copy_(flat[0][piece]).mul_(weights[0])  # and not 0 + x, which loses -0.0
        for x, weight in zip(flat[1:], weights[1:], strict=True):
            partial.add_(x[piece], alpha=weight)
        total[piece].copy_(partial)


class _WeightedSum(torch.autograd.Function):
    """The eager path: the same sum as the custom op's, without its cost per call."""

    @staticmethod
    def forward(
        ctx: Any, weights: list[float], dtype: torch.dtype, name: str, *tensors: Tensor
    ) -> Tensor:
        ctx.weights, ctx.dtype = weights, tensors[0].dtype
        return _sum(name, tensors, weights, dtype)

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        wants = ctx.needs_input_grad[3:]
        grads = [
            (dy.float() * w).to(ctx.dtype) if wanted else None
            for w, wanted in zip(ctx.weights, wants, strict=True)
        ]
        return (None, None, None, *grads)


@torch.library.custom_op("triptych::weighted_sum", mutates_args=())
def _weighted_sum(
    tensors: list[Tensor], weights: list[float], dtype: torch.dtype, name: str
) -> Tensor:
    return _sum(name, tensors, weights, dtype)


@_weighted_sum.register_fake
def _(tensors: list[Tensor], weights: list[float], dtype: torch.dtype, name: str) -> Tensor:
    return tensors[0].new_empty(tensors[0].shape, dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.weights, ctx.dtype = inputs[1], inputs[0][0].dtype


def _differentiate(ctx: Any, dy: Tensor) -> tuple[list[Tensor], None, None, None]:
    return [(dy.float() * w).to(ctx.dtype) for w in ctx.weights], None, None, None


_weighted_sum.register_autograd(_differentiate, setup_context=_save)


def _check(
    tensors: Sequence[Tensor], weights: Sequence[float], out: Tensor | None, dtype: torch.dtype
) -> None:
    if not len(tensors) or len(tensors) != len(weights):
        raise ValueError(
            f"weighted_sum: there must be at least one tensor and one weight per tensor, got "
            f"{len(tensors)} tensors and {len(weights)} weights; make the two lists the same length"
        )
    first = tensors[0]
    for index, x in enumerate(tensors):
        if (x.shape, x.dtype, x.device) != (first.shape, first.dtype, first.device):
            raise ValueError(
                f"weighted_sum: tensors[{index}] must be like tensors[0], {_describe(first)}, got "
                f"{_describe(x)}; average only what belongs together"
            )
    for what, kind in (("the tensors", first.dtype), ("the output", dtype)):
        if kind not in _DTYPES:
            raise ValueError(
                f"weighted_sum: {what} must be float16, bfloat16 or float32, got {kind}; convert "
                f"them, or leave tensors of other dtypes out of the average"
            )
    if out is None:
        return
    if (out.shape, out.dtype, out.device) != (first.shape, dtype, first.device):
        raise ValueError(
            f"weighted_sum: out must be {tuple(first.shape)} {dtype} on {first.device}, got "
            f"{_describe(out)}; leave it out to have one made"
        )
    if torch.is_grad_enabled() and any(x.requires_grad for x in (out, *tensors)):
        raise ValueError(
            "weighted_sum: with out= no tensor may require a gradient, got one that does; wrap the "
            "call in torch.no_grad()"
        )


def _describe(x: Tensor) -> str:
    return f"{tuple(x.shape)} {x.dtype} on {x.device}"
