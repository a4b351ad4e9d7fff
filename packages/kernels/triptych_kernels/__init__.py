"""Fused training ops for PyTorch, each beside its plain reference."""

from .attention import attention, attention_ref
from .dispatch import explain, use_backend
from .linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_ref
from .modules import RMSNorm, SwiGLU
from .rms_norm import rms_norm, rms_norm_ref
from .swiglu import swiglu, swiglu_ref

__all__ = [
    "RMSNorm",
    "SwiGLU",
    "attention",
    "attention_ref",
    "explain",
    "linear_cross_entropy",
    "linear_cross_entropy_ref",
    "rms_norm",
    "rms_norm_ref",
    "swiglu",
    "swiglu_ref",
    "use_backend",
]
