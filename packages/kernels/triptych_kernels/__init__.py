"""Fused training ops for PyTorch, each beside its plain reference."""

from .adamw import adamw_, adamw_ref
from .add_rms_norm import add_rms_norm, add_rms_norm_ref
from .attention import attention, attention_ref
from .causal_conv1d import causal_conv1d, causal_conv1d_ref
from .dispatch import use_backend
from .explain import explain
from .fuse import FuseReport, fuse, unfuse
from .gate_add import gate_add, gate_add_ref
from .gated_delta_rule import gated_delta_rule, gated_delta_rule_ref
from .gated_rms_norm import gated_rms_norm, gated_rms_norm_ref
from .geglu import geglu, geglu_ref
from .layer_norm import layer_norm, layer_norm_ref
from .linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_ref
from .modulate import modulate, modulate_ref
from .modules import (
    AdaLayerNorm,
    GatedRMSNorm,
    GeGLU,
    LayerNorm,
    RMSNorm,
    RotaryEmbedding,
    SwiGLU,
)
from .moe import moe_mlp, moe_mlp_ref
from .moe_routing import balance_loss, expert_counts, route, z_loss
from .muon import Muon
from .native_sparse_attention import native_sparse_attention, native_sparse_attention_ref
from .newton_schulz import newton_schulz, newton_schulz_ref
from .rms_norm import rms_norm, rms_norm_ref
from .rope import apply_rope, apply_rope_ref, rope_tables
from .swiglu import swiglu, swiglu_ref
from .transformers_attention import register_attention
from .weighted_sum import weighted_sum, weighted_sum_ref

__all__ = [
    "AdaLayerNorm",
    "FuseReport",
    "GatedRMSNorm",
    "GeGLU",
    "LayerNorm",
    "Muon",
    "RMSNorm",
    "RotaryEmbedding",
    "SwiGLU",
    "adamw_",
    "adamw_ref",
    "add_rms_norm",
    "add_rms_norm_ref",
    "apply_rope",
    "apply_rope_ref",
    "attention",
    "attention_ref",
    "balance_loss",
    "causal_conv1d",
    "causal_conv1d_ref",
    "expert_counts",
    "explain",
    "fuse",
    "gate_add",
    "gate_add_ref",
    "gated_delta_rule",
    "gated_delta_rule_ref",
    "gated_rms_norm",
    "gated_rms_norm_ref",
    "geglu",
    "geglu_ref",
    "layer_norm",
    "layer_norm_ref",
    "linear_cross_entropy",
    "linear_cross_entropy_ref",
    "modulate",
    "modulate_ref",
    "moe_mlp",
    "moe_mlp_ref",
    "native_sparse_attention",
    "native_sparse_attention_ref",
    "newton_schulz",
    "newton_schulz_ref",
    "register_attention",
    "rms_norm",
    "rms_norm_ref",
    "rope_tables",
    "route",
    "swiglu",
    "swiglu_ref",
    "unfuse",
    "use_backend",
    "weighted_sum",
    "weighted_sum_ref",
    "z_loss",
]
