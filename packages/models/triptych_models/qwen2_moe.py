"""Qwen2-MoE (text alone): beside its experts a shared one, which all tokens run through."""

from transformers import Qwen2MoeForCausalLM

from .mixture import Mixture
from .qwen3 import Qwen3


class Qwen2MoE(Mixture, Qwen3):
    """Transformers' Qwen2-MoE, fed with packed rows as Qwen3 is."""

    hf_class = Qwen2MoeForCausalLM
    model_type = "qwen2_moe"
