"""Qwen3-MoE (text alone): Qwen3 with experts."""

from transformers import Qwen3MoeForCausalLM

from .mixture import Mixture
from .qwen3 import Qwen3


class Qwen3MoE(Mixture, Qwen3):
    """Transformers' Qwen3-MoE, fed with packed rows."""

    hf_class = Qwen3MoeForCausalLM
    model_type = "qwen3_moe"
