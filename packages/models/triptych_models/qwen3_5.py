"""Qwen3.5 (text alone), dense: three layers of Gated DeltaNet to one of gated attention.

With every entry of layer_types `linear_attention` it is a plain Gated DeltaNet language model.
"""

from transformers import Qwen3_5ForCausalLM

from .linear_attention import LinearAttention
from .qwen3 import Qwen3


class Qwen35(LinearAttention, Qwen3):
    """Transformers' Qwen3.5 language model, fed with packed rows."""

    hf_class = Qwen3_5ForCausalLM
    model_type = "qwen3_5_text"
