"""GeGLU: gelu(gate) * up, with gelu(x) = x * Phi(x) (Shazeer, arXiv 2002.05202).

Phi is the normal distribution function, or its tanh approximation (Hendrycks, arXiv 1606.08415):
Phi(x) ~ (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) / 2.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .autograd import first_order
from .dispatch import choose, is_traced


def geglu(
    gate: Tensor,
    up: Tensor,
    *,
    approximate: Literal["none", "tanh"] = "tanh",
    backend: str | None = None,
) -> Tensor:
    """Gate `up` by gelu(gate), element by element.

    gate, up: (..., F) of one dtype, also as two halves of one tensor; returns (..., F) in that
    dtype. `approximate` is F.gelu's: "tanh" (Gemma) or "none", the exact one. gelu is computed in
    float32 and rounded before the product, as transformers does. On CUDA: one launch forward, one
    backward, and nothing is kept but the two inputs.

    Raises ValueError when the shapes or dtypes differ, or for another `approximate`.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"geglu: gate and up must have one shape and dtype, got {tuple(gate.shape)} "
            f"{gate.dtype} and {tuple(up.shape)} {up.dtype}; make them the same"
        )
    if approximate not in ("none", "tanh"):
        raise ValueError(
            f"geglu: approximate must be 'none' or 'tanh', got {approximate!r}; name one of these"
        )
    if choose("geglu", gate, backend) == "reference":
        return geglu_ref(gate, up, approximate=approximate)
    tanh = approximate == "tanh"
    return _geglu(gate, up, tanh) if is_traced(gate) else _GeGLU.apply(gate, up, tanh)


def geglu_ref(gate: Tensor, up: Tensor, *, approximate: Literal["none", "tanh"] = "tanh") -> Tensor:
    """`geglu` in plain torch, which torch.compile may fuse with what is around it."""
    return F.gelu(gate, approximate=approximate) * up


class _GeGLU(torch.autograd.Function):
    """The eager path: the same kernels as the custom op's, without its cost per call."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, tanh: bool) -> Tensor:
        from .triton_ops import geglu as kernels

        ctx.save_for_backward(gate, up)
        ctx.tanh = tanh
        return kernels.forward(gate, up, tanh)

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        from .triton_ops import geglu as kernels

        gate, up = ctx.saved_tensors
        return (*kernels.backward(dy, gate, up, ctx.tanh), None)


@torch.library.custom_op("triptych::geglu", mutates_args=())
def _geglu(gate: Tensor, up: Tensor, tanh: bool) -> Tensor:
    from .triton_ops import geglu as kernels

    return kernels.forward(gate, up, tanh)


@_geglu.register_fake
def _(gate: Tensor, up: Tensor, tanh: bool) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op("triptych::geglu_backward", mutates_args=())
def _geglu_backward(dy: Tensor, gate: Tensor, up: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
    from .triton_ops import geglu as kernels

    return kernels.backward(dy, gate, up, tanh)


@_geglu_backward.register_fake
def _(dy: Tensor, gate: Tensor, up: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.tanh = inputs
    ctx.save_for_backward(gate, up)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
    return (*_geglu_backward(dy, *ctx.saved_tensors, ctx.tanh), None)


_geglu.register_autograd(_differentiate, setup_context=_save)
