"""nn.Modules over the ops; their parameters carry the names that transformers gives them."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .add_rms_norm import add_rms_norm
from .gate_add import gate_add
from .gated_rms_norm import gated_rms_norm
from .geglu import geglu
from .layer_norm import layer_norm
from .modulate import modulate
from .rms_norm import rms_norm
from .rope import Layout, rope_tables
from .swiglu import swiglu


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension: (..., hidden_size) -> (..., hidden_size).

    Parameter: weight (hidden_size,), ones at the start; zeros when `zero_centered`, where 1 is
    added to it (Gemma, Qwen3-Next).
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6, *, zero_centered: bool = False) -> None:
        super().__init__()
        start = torch.zeros if zero_centered else torch.ones
        self.weight = nn.Parameter(start(hidden_size))
        self.variance_epsilon = eps
        self.zero_centered = zero_centered

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.variance_epsilon, zero_centered=self.zero_centered)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """x + residual, normed, and as it is: `add_rms_norm` with this module's weight."""
        return add_rms_norm(
            x, residual, self.weight, self.variance_epsilon, zero_centered=self.zero_centered
        )

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.variance_epsilon}"


class GatedRMSNorm(nn.Module):
    """RMSNorm times silu(gate): two (..., hidden_size) -> (..., hidden_size).

    Parameter: weight (hidden_size,), ones at the start.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return gated_rms_norm(x, gate, self.weight, self.variance_epsilon)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.variance_epsilon}"


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm over the last dimension, with its parameters and arguments."""

    def forward(self, input: Tensor) -> Tensor:
        if len(self.normalized_shape) != 1:
            raise ValueError(
                f"LayerNorm: normalized_shape must be one dimension, got {self.normalized_shape}; "
                f"use nn.LayerNorm"
            )
        return layer_norm(input, self.weight, self.bias, self.eps)


class SwiGLU(nn.Module):
    """The gated feed-forward block: down_proj(silu(gate_proj(x)) * up_proj(x)).

    (..., hidden_size) -> (..., hidden_size), through intermediate_size; no biases.
    """

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class GeGLU(SwiGLU):
    """SwiGLU with gelu for silu; `approximate` is F.gelu's."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        approximate: Literal["none", "tanh"] = "tanh",
    ) -> None:
        super().__init__(hidden_size, intermediate_size)
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(geglu(gate, up, approximate=self.approximate))


class RotaryEmbedding(nn.Module):
    """The cos and sin tables of `apply_rope` for some position_ids; see `rope_tables`.

    Buffer: inv_freq (rotary_dim / 2,), theta^(-2 i / rotary_dim), not in the state dict; half as
    many for the layout "axial".
    """

    inv_freq: Tensor

    def __init__(
        self,
        rotary_dim: int,
        theta: float = 10000.0,
        *,
        layout: Layout = "plain",
        mrope_section: list[int] | None = None,
    ) -> None:
        super().__init__()
        width = rotary_dim // 2 if layout == "axial" else rotary_dim
        inv_freq = 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.layout: Layout = layout
        self.mrope_section = mrope_section

    @torch.no_grad()
    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return rope_tables(
            position_ids, self.inv_freq, layout=self.layout, mrope_section=self.mrope_section
        )


class AdaLayerNorm(nn.Module):
    """adaLN-Zero around a sub-block f: x + gate * f(norm(x) * (1 + scale) + shift) (DiT).

    `enter(x, condition)` gives the input of f and the gate, `leave(x, f(...), gate)` the sum.
    condition: (B, condition_size) for x (B, T, hidden_size), or one per document of a packed row
    x (T, hidden_size) with cu_seqlens. Parameters: linear.weight (3 hidden_size, condition_size)
    and linear.bias, zeros at the start, so that the block starts as the identity.
    """

    def __init__(self, hidden_size: int, condition_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.linear = nn.Linear(condition_size, 3 * hidden_size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.eps = eps

    def enter(
        self, x: Tensor, condition: Tensor, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        shift, scale, gate = self.linear(F.silu(condition)).chunk(3, dim=-1)
        normed = layer_norm(x, eps=self.eps)
        return modulate(normed, shift, scale, cu_seqlens=cu_seqlens), gate

    def leave(
        self, residual: Tensor, x: Tensor, gate: Tensor, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        return gate_add(residual, x, gate, cu_seqlens=cu_seqlens)
