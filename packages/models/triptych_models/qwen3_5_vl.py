"""Qwen3.5 as published: its language model behind Qwen3-VL's tower, which no layer taps."""

from torch import nn
from transformers import Qwen3_5ForConditionalGeneration, Qwen3_5MoeForConditionalGeneration

from .layout import StoredExperts
from .linear_attention import LinearAttention
from .mixture import Mixture
from .qwen3_vl import Qwen3VL


class Qwen35VL(LinearAttention, Qwen3VL):
    """Transformers' Qwen3.5, `self.hf`, fed with packed rows as Qwen3-VL is."""

    hf_class = Qwen3_5ForConditionalGeneration
    model_type = "qwen3_5"

    def parts(self) -> dict[str, list[nn.Module]]:
        """Modules of each part; every parameter is in exactly one."""
        visual = self.hf.model.visual
        return {
            "vision": [visual.patch_embed, visual.pos_embed, visual.blocks],
            "projector": [visual.merger],
            "language": [self.hf.model.language_model, self.hf.lm_head],
        }


class Qwen35VLMoE(Mixture, Qwen35VL):
    """Transformers' Qwen3.5-MoE, fed with packed rows; its tower is Qwen3.5's."""

    hf_class = Qwen3_5MoeForConditionalGeneration
    model_type = "qwen3_5_moe"
    stored = StoredExperts(is_stacked=True)
