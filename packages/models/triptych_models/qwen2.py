"""Qwen2 and Qwen2.5 (dense, text alone): queries, keys and values with biases, no norms on them."""

from transformers import Qwen2ForCausalLM

from .qwen3 import Qwen3


class Qwen2(Qwen3):
    """Transformers' Qwen2, fed with packed rows as Qwen3 is."""

    hf_class = Qwen2ForCausalLM
    model_type = "qwen2"
