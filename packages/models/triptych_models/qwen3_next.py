"""Qwen3-Next (text alone): three layers of Gated DeltaNet to one of gated attention, all sparse."""

from transformers import Qwen3NextForCausalLM

from .linear_attention import LinearAttention
from .mixture import Mixture
from .qwen3 import Qwen3


class Qwen3Next(LinearAttention, Mixture, Qwen3):
    """Transformers' Qwen3-Next, fed with packed rows."""

    hf_class = Qwen3NextForCausalLM
    model_type = "qwen3_next"
