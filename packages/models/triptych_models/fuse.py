"""Swap stock modules of one model instance for ours; parameters and their names stay the same."""

from torch import Tensor, nn
from transformers import Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    Qwen3VLTextMLP,
    Qwen3VLTextRMSNorm,
    Qwen3VLVisionAttention,
)

from triptych_kernels import rms_norm, swiglu

from .attention import PackedVisionAttention


def pack_vision_attention(model: Qwen3VLForConditionalGeneration) -> None:
    """Give every block of the vision tower packed attention."""
    swap(model, Qwen3VLVisionAttention, PackedVisionAttention)


def fuse(model: Qwen3VLForConditionalGeneration) -> None:
    """Give RMSNorm and SwiGLU layers the kernels of triptych_kernels."""
    swap(model, Qwen3VLTextRMSNorm, FusedRMSNorm)
    if model.config.text_config.hidden_act == "silu":
        swap(model, Qwen3VLTextMLP, FusedMLP)


def swap(model: nn.Module, stock: type[nn.Module], ours: type[nn.Module]) -> None:
    """Replace every `stock` module inside `model` by `ours(stock module)`."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is stock:
                setattr(parent, name, ours(child))


class FusedRMSNorm(nn.Module):
    """RMSNorm over the last dim of x (…, H)."""

    def __init__(self, stock: Qwen3VLTextRMSNorm) -> None:
        super().__init__()
        self.weight = stock.weight
        self.eps = stock.variance_epsilon

    def forward(self, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, self.weight, self.eps)


class FusedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)) for x (…, H)."""

    def __init__(self, stock: Qwen3VLTextMLP) -> None:
        super().__init__()
        self.gate_proj = stock.gate_proj
        self.up_proj = stock.up_proj
        self.down_proj = stock.down_proj

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
