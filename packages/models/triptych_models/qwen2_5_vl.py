"""Qwen2.5-VL as a packed-sequence module with its loss inside."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration

from .flops import gated_tower, one_merger_flops
from .lora import adapter_flops
from .qwen3_vl import Qwen3VL
from .vision import normalize_pixels
from .vision_windows import window_features, window_side


class Qwen2_5VL(Qwen3VL):
    """Transformers' Qwen2.5-VL, `self.hf`, fed with packed rows as Qwen3-VL is.

    Its tower attends within windows, its features go in before the first language layer alone.
    """

    hf_class = Qwen2_5_VLForConditionalGeneration
    model_type = "qwen2_5_vl"

    def parts(self) -> dict[str, list[nn.Module]]:
        """Modules of each part; every parameter is in exactly one."""
        visual = self.hf.model.visual
        return {
            "vision": [visual.patch_embed, visual.blocks],
            "projector": [visual.merger],
            "language": [self.hf.model.language_model, self.hf.lm_head],
        }

    def flops(self, batch: Mapping[str, Any]) -> float:
        """Forward and backward FLOPs of one packed row; see triptych_models.flops."""
        config, parts, adapted = self.hf.config, self.trainable_parts(), self.lora is not None
        vision = config.vision_config
        side = window_side(vision) * vision.spatial_merge_size
        blocks = partial(gated_tower, vision, side=side)
        return one_merger_flops(config, batch, blocks, parts, adapted=adapted) + adapter_flops(
            self, batch
        )

    def _image_features(
        self, pixel_values: Tensor, grid_thw: Tensor, cu_seqlens: Tensor, max_seqlen: int
    ) -> tuple[Tensor, list[Tensor]]:
        scaled = normalize_pixels(pixel_values, self.image_mean, self.image_std)
        features = window_features(
            self.hf.model.visual, scaled, grid_thw, cu_seqlens, max_seqlen, self.run_layer
        )
        return features, []
