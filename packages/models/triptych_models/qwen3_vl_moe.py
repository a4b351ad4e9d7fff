"""Qwen3-VL-MoE: Qwen3-VL whose language layers have experts."""

from transformers import Qwen3VLMoeForConditionalGeneration

from .layout import StoredExperts
from .mixture import Mixture
from .qwen3_vl import Qwen3VL


class Qwen3VLMoE(Mixture, Qwen3VL):
    """Transformers' Qwen3-VL-MoE, fed with packed rows; its tower is Qwen3-VL's."""

    hf_class = Qwen3VLMoeForConditionalGeneration
    model_type = "qwen3_vl_moe"
    stored = StoredExperts(is_stacked=True, is_transposed=True)
