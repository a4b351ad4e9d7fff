"""On which backend a model's dearest ops run, and what keeps them off a faster one."""

from typing import Any

import torch

from triptych_kernels.explain import taken

from .experts import Experts
from .layout import decoder, ear, head_dim, text_config, tower
from .packed import PackedModel


def backends(model: PackedModel, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Backends by op: what a run without a faster one must say, as nothing else would show it.

    {"attention": "flash4", "attention of vision": "varlen (not flash4: needs a head_dim of …)"}.
    """
    return {name: taken(op, device, dtype, width) for name, (op, width) in dear_ops(model).items()}


def dear_ops(model: PackedModel) -> dict[str, tuple[str, int]]:
    """Ops of triptych_kernels whose backends are far apart, with the last width that each sees."""
    hf, text = model.hf, text_config(model.hf.config)
    layers = decoder(hf).layers
    found = {"attention": ("attention", head_dim(text))}
    if all(hasattr(layer, "linear_attn") for layer in layers):
        del found["attention"]
    config = model.hf.config
    seen = getattr(config, "vision_config", getattr(config, "vit_config", None))
    for part, module, section in (
        ("vision", tower(hf), seen),
        ("audio", ear(hf), getattr(config, "audio_config", None)),
    ):
        if module is not None:
            found[f"attention of {part}"] = ("attention", _head_width(section))
    deltas = [layer.linear_attn for layer in layers if hasattr(layer, "linear_attn")]
    if deltas:
        found["gated_delta_rule"] = ("gated_delta_rule", deltas[0].head_k_dim)
    if any(isinstance(module, Experts) for module in hf.modules()):
        found["moe_mlp"] = ("moe_mlp", text.hidden_size)
    return found


def _head_width(config: Any) -> int:
    """Of a tower, whose sections name the same things differently."""
    width = getattr(config, "d_model", None) or config.hidden_size
    for name in ("encoder_attention_heads", "num_attention_heads", "num_heads"):
        if heads := getattr(config, name, None):
            return int(width // heads)
    raise AssertionError("a tower has heads")
