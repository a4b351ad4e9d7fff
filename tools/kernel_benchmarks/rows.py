"""Ops that are bound by memory: norms, gates, rotary embedding, modulation, weighted sum.

`eager` is the formula as transformers or diffusers write it; `torch` is torch's own fused op.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .op import Call, Draw, Inputs, Op, Shape, Work, found, ours


def rows_inputs(count: int, *, weights: int = 0) -> Any:
    """`count` tensors (rows, width), then `weights` vectors (width,)."""

    def inputs(s: Shape, draw: Draw) -> Inputs:
        tensors = [draw.randn(s.rows, s.width) for _ in range(count)]
        return Inputs(tensors + [1 + draw.randn(s.width, scale=0.1) for _ in range(weights)], {})

    return inputs


def tensors_moved(count: int) -> Any:
    """Work of reading and writing `count` tensors (rows, width)."""
    return lambda s: Work(count * s.rows * s.width)


def eager_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def liger_rms_norm() -> Call:
    function = found("liger_kernel.ops.rms_norm", "LigerRMSNormFunction")
    return lambda x, weight: function.apply(x, weight, 1e-6)


def quack_rms_norm() -> Call:
    rmsnorm = found("quack.rmsnorm", "rmsnorm")
    return lambda x, weight: rmsnorm(x, weight, eps=1e-6)


def eager_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return eager_rms_norm(total, weight), total


def liger_add_rms_norm() -> Call:
    function = found("liger_kernel.ops.fused_add_rms_norm", "LigerFusedAddRMSNormFunction")
    return lambda x, residual, weight: function.apply(x, residual, weight, 1e-6)


def quack_add_rms_norm() -> Call:
    rmsnorm = found("quack.rmsnorm", "rmsnorm")
    return lambda x, residual, weight: rmsnorm(x, weight, residual=residual, eps=1e-6, prenorm=True)


def eager_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    wide = x.float()
    centred = wide - wide.mean(-1, keepdim=True)
    x_hat = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-5)
    return (x_hat * weight + bias).to(x.dtype)


def liger_layer_norm() -> Call:
    function = found("liger_kernel.ops.layer_norm", "LigerLayerNormFunction")
    return lambda x, weight, bias: function.apply(x, weight, bias, 1e-5)


def liger_swiglu() -> Call:
    return found("liger_kernel.ops.swiglu", "LigerSiLUMulFunction").apply


def liger_geglu() -> Call:
    return found("liger_kernel.ops.geglu", "LigerGELUMulFunction").apply


def rope_inputs(s: Shape, draw: Draw) -> Inputs:
    angles = draw.rand(s.tokens, s.head_dim // 2).mul(100).repeat(1, 2)
    q, k = (draw.randn(s.tokens, heads, s.head_dim) for heads in (s.heads, s.kv_heads))
    return Inputs([q, k], {"cos": angles.cos().to(draw.dtype), "sin": angles.sin().to(draw.dtype)})


def eager_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    def turned(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return x * cos.unsqueeze(1) + torch.cat([-b, a], dim=-1) * sin.unsqueeze(1)

    return turned(q), turned(k)


def liger_rope() -> Call:
    """Liger turns q and k in place, in the layout (batch, heads, tokens, head_dim)."""
    function = found("liger_kernel.ops.rope", "LigerRopeFunction")

    def call(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        turned = function.apply(*(x.unsqueeze(0).transpose(1, 2) for x in (q, k)), cos, sin)
        return tuple(x.transpose(1, 2).squeeze(0) for x in turned)

    return call


def rope_work(s: Shape) -> Work:
    return Work(2 * s.tokens * (s.heads + s.kv_heads) * s.head_dim + s.tokens * s.head_dim)


def modulate_inputs(s: Shape, draw: Draw) -> Inputs:
    conditions = [draw.randn(s.batch, s.width, scale=0.1) for _ in range(2)]
    return Inputs([draw.randn(s.batch, s.tokens, s.width), *conditions], {})


def eager_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def weighted_sum_inputs(s: Shape, draw: Draw) -> Inputs:
    weights = [2 * (i + 1) / s.tensors / (s.tensors + 1) for i in range(s.tensors)]
    return Inputs([draw.randn(s.elements) for _ in range(s.tensors)], {"weights": weights})


def eager_weighted_sum(*tensors: Tensor, weights: list[float]) -> Tensor:
    total = tensors[0].float() * weights[0]
    for x, weight in zip(tensors[1:], weights[1:], strict=True):
        total.add_(x, alpha=weight)
    return total.to(tensors[0].dtype)


def ours_weighted_sum() -> Call:
    weighted_sum = found("triptych_kernels", "weighted_sum")
    return lambda *tensors, weights: weighted_sum(tensors, weights)


ROWS = ("rows", "width")
WIDTHS = [(16384, 2048), (16384, 4096), (4096, 2048), (1024, 1024)]

RMS_NORM = Op(
    dims=ROWS,
    shapes=[*WIDTHS, (16384 * 16, 128)],
    tiny=(6, 32),
    inputs=rows_inputs(1, weights=1),
    providers={
        "eager": lambda: eager_rms_norm,
        "torch": lambda: lambda x, weight: F.rms_norm(x, weight.shape, weight, 1e-6),
        "liger": liger_rms_norm,
        "quack": quack_rms_norm,
        "ours": ours("rms_norm"),
    },
    forward=tensors_moved(2),  # x -> y
    backward=tensors_moved(3),  # x, dy -> dx
)

ADD_RMS_NORM = Op(
    dims=ROWS,
    shapes=WIDTHS,
    tiny=(6, 32),
    inputs=rows_inputs(2, weights=1),
    providers={
        "eager": lambda: eager_add_rms_norm,
        "liger": liger_add_rms_norm,
        "quack": quack_add_rms_norm,
        "ours": ours("add_rms_norm"),
    },
    forward=tensors_moved(4),  # x, residual -> y, sum
    backward=tensors_moved(4),  # sum, dy, dsum -> one gradient for both
)

LAYER_NORM = Op(
    dims=ROWS,
    shapes=WIDTHS,
    tiny=(6, 32),
    inputs=rows_inputs(1, weights=2),
    providers={
        "eager": lambda: eager_layer_norm,
        "torch": lambda: lambda x, weight, bias: F.layer_norm(x, weight.shape, weight, bias),
        "liger": liger_layer_norm,
        "ours": ours("layer_norm"),
    },
    forward=tensors_moved(2),
    backward=tensors_moved(3),
)

SWIGLU = Op(
    dims=ROWS,
    shapes=[(16384, 2048), (16384, 6144), (4096, 6144), (1024, 1024)],
    tiny=(6, 32),
    inputs=rows_inputs(2),
    providers={
        "eager": lambda: lambda gate, up: F.silu(gate) * up,
        "liger": liger_swiglu,
        "ours": ours("swiglu"),
    },
    forward=tensors_moved(3),  # gate, up -> y
    backward=tensors_moved(5),  # gate, up, dy -> dgate, dup
)

GEGLU = Op(
    dims=ROWS,
    shapes=SWIGLU.shapes,
    tiny=(6, 32),
    inputs=rows_inputs(2),
    providers={
        "eager": lambda: lambda gate, up: F.gelu(gate, approximate="tanh") * up,
        "liger": liger_geglu,
        "ours": ours("geglu"),
    },
    forward=tensors_moved(3),
    backward=tensors_moved(5),
)

ROPE = Op(
    dims=("tokens", "heads", "kv_heads", "head_dim"),
    shapes=[(16384, 16, 8, 128), (16384, 32, 8, 128), (2048, 16, 8, 128)],
    tiny=(6, 4, 2, 16),
    inputs=rope_inputs,
    providers={"eager": lambda: eager_rope, "liger": liger_rope, "ours": ours("apply_rope")},
    forward=rope_work,
    backward=rope_work,
)

MODULATE = Op(
    dims=("batch", "tokens", "width"),
    shapes=[(8, 4096, 3072), (16, 1024, 1152)],
    tiny=(2, 5, 32),
    inputs=modulate_inputs,
    providers={"eager": lambda: eager_modulate, "ours": ours("modulate")},
    forward=lambda s: Work(2 * s.batch * s.tokens * s.width),  # x -> y
    backward=lambda s: Work(3 * s.batch * s.tokens * s.width),  # x, dy -> dx
)

WEIGHTED_SUM = Op(
    dims=("tensors", "elements"),
    shapes=[(4, 2**26), (16, 2**24)],
    tiny=(3, 100),
    inputs=weighted_sum_inputs,
    providers={"eager": lambda: eager_weighted_sum, "ours": ours_weighted_sum},
    forward=lambda s: Work((s.tensors + 1) * s.elements),
    backward=None,
)
