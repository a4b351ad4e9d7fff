"""SwiGLU: silu(gate) * up, with silu(x) = x / (1 + exp(-x)) (Shazeer, arXiv 2002.05202)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .autograd import first_order
from .dispatch import choose, is_traced


def swiglu(gate: Tensor, up: Tensor, *, backend: str | None = None) -> Tensor:
    """Gate `up` by silu(gate), element by element.

    gate, up: (..., F) of one dtype, also as two halves of one tensor; returns (..., F) in that
    dtype. silu is computed in float32 and rounded before the product, as transformers does. On
    CUDA: one launch forward, one backward, and nothing is kept but the two inputs.

    Raises ValueError when the shapes or dtypes differ.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"swiglu: gate and up must have one shape and dtype, got {tuple(gate.shape)} "
            f"{gate.dtype} and {tuple(up.shape)} {up.dtype}; make them the same"
        )
    if choose("swiglu", gate, backend) == "reference":
        return swiglu_ref(gate, up)
    return _swiglu(gate, up) if is_traced(gate) else _SwiGLU.apply(gate, up)


def swiglu_ref(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu` in plain torch, which torch.compile may fuse with what is around it."""
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    """The eager path: the same kernels as the custom op's, without its cost per call."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        from .triton_ops import swiglu as kernels

        ctx.save_for_backward(gate, up)
        return kernels.forward(gate, up)

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        from .triton_ops import swiglu as kernels

        return kernels.backward(dy, *ctx.saved_tensors)


@torch.library.custom_op("triptych::swiglu", mutates_args=())
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    from .triton_ops import swiglu as kernels

    return kernels.forward(gate, up)


@_swiglu.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op("triptych::swiglu_backward", mutates_args=())
def _swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    from .triton_ops import swiglu as kernels

    return kernels.backward(dy, gate, up)


@_swiglu_backward.register_fake
def _(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    return _swiglu_backward(dy, *ctx.saved_tensors)


_swiglu.register_autograd(_differentiate, setup_context=_save)
