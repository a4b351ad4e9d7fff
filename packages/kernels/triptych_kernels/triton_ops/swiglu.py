# mypy: allow-untyped-defs
# (the arguments of a kernel are typed by Triton)
"""SwiGLU on Triton; the formula and the op are in ../swiglu.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .rows import as_rows

_BLOCK = 1024  # with 4 warps each thread moves 8 elements: 16 bytes of bfloat16 per load


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up (..., F) -> (..., F)."""
    y = torch.empty_like(gate, memory_format=torch.contiguous_format)
    if y.numel():
        gate_rows, up_rows = as_rows(gate), as_rows(up)
        num_rows, width = gate_rows.shape
        launch(
            _forward_kernel,
            (num_rows, -(-width // _BLOCK), 1),
            (gate_rows, up_rows, y),
            (width, gate_rows.stride(0), up_rows.stride(0)),
            (_BLOCK,),
        )
    return y


def backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """-> dgate, dup (..., F)."""
    dgate = torch.empty_like(gate, memory_format=torch.contiguous_format)
    dup = torch.empty_like(dgate)
    if dgate.numel():
        dy_rows, gate_rows, up_rows = as_rows(dy), as_rows(gate), as_rows(up)
        num_rows, width = gate_rows.shape
        launch(
            _backward_kernel,
            (num_rows, -(-width // _BLOCK), 1),
            (dy_rows, gate_rows, up_rows, dgate, dup),
            (width, dy_rows.stride(0), gate_rows.stride(0), up_rows.stride(0)),
            (_BLOCK,),
        )
    return dgate, dup


@triton.jit
def _forward_kernel(gate_ptr, up_ptr, y_ptr, width, gate_stride, up_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < width
    gate = tl.load(gate_ptr + row * gate_stride + col, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + col, mask=inside, other=0.0).to(tl.float32)
    silu = (gate * tl.sigmoid(gate)).to(y_ptr.dtype.element_ty).to(tl.float32)
    tl.store(y_ptr + row * width + col, silu * up, mask=inside)


@triton.jit
def _backward_kernel(
    dy_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    width,
    dy_stride,
    gate_stride,
    up_stride,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < width
    dy = tl.load(dy_ptr + row * dy_stride + col, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + col, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + col, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    # d silu / d gate = sigmoid * (1 + gate * (1 - sigmoid)) = sigmoid + silu * (1 - sigmoid)
    tl.store(
        dgate_ptr + row * width + col, dy * up * (sigmoid + silu * (1.0 - sigmoid)), mask=inside
    )
    silu = silu.to(dup_ptr.dtype.element_ty).to(tl.float32)  # the silu that the forward used
    tl.store(dup_ptr + row * width + col, dy * silu, mask=inside)
