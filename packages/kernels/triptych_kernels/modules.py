"""nn.Modules over the ops; their parameters carry the names that transformers gives them."""

import torch
from torch import Tensor, nn

from .rms_norm import rms_norm
from .swiglu import swiglu


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension: (..., hidden_size) -> (..., hidden_size).

    Parameter: weight (hidden_size,), ones at the start.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.variance_epsilon)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.variance_epsilon}"


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
