"""Qwen3.5-MoE (text alone): Qwen3.5 with experts, and one that all tokens run through."""

from transformers import Qwen3_5MoeForCausalLM

from .linear_attention import LinearAttention
from .mixture import Mixture
from .qwen3 import Qwen3


class Qwen35MoE(LinearAttention, Mixture, Qwen3):
    """Transformers' Qwen3.5-MoE language model, fed with packed rows."""

    hf_class = Qwen3_5MoeForCausalLM
    model_type = "qwen3_5_moe_text"
