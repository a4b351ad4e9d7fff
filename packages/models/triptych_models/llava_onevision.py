"""LLaVA-OneVision as a packed-sequence module: images of any resolution in tiles, pooled videos.

The architecture is transformers' own LlavaOnevisionForConditionalGeneration (arXiv 2408.03326): a
SigLIP, a projector of two layers, a Qwen2. Which features of tiles a token is made of comes with
the batch, as `image_taps`.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaOnevisionForConditionalGeneration, PretrainedConfig

from .llava import Llava, check_tower, one_side
from .sequence import exchange_features

_RATIO = re.compile(r"anyres_max_([1-9]\d*)")


class LlavaOnevision(Llava):
    """Transformers' LLaVA-OneVision, `self.hf`, fed with packed rows as a LLaVA is."""

    hf_class = LlavaOnevisionForConditionalGeneration
    model_type = "llava_onevision"

    def __init__(self, hf_config: PretrainedConfig, **settings: Any) -> None:
        super().__init__(hf_config, **settings)
        self.line_break = LineBreak(self.hf.model.image_newline)

    def arrange(self, features: Tensor, taps: Tensor | None, weights: Tensor | None) -> Tensor:
        """Features (N, H) of tiles to those of tokens (M, H), each made of taps (M, 4)."""
        rows = self.line_break(features)  # (N + 1, H); the last is also number -1
        if taps is None or weights is None:
            return rows[:0]
        summed = sum(rows[taps[:, k]] * weights[:, k, None] for k in range(taps.shape[1]))
        assert isinstance(summed, Tensor)
        return summed.to(features.dtype)

    def exchange(self, features: Tensor, sends: Sequence[int], receives: Sequence[int]) -> Tensor:
        """All features to every rank of the group: a token is made of features of many tiles."""
        copies = features.repeat(self.sequence.size, 1)
        return exchange_features([copies], sends, receives, self.sequence)[0]

    def image_rules(self) -> dict[str, Any]:
        """What the data's processor must say of images, by the name of its attribute."""
        config = self.hf.config
        resolutions = tuple(tuple(size) for size in config.image_grid_pinpoints)
        side = one_side(config.vision_config.image_size)
        tiling = (side, self.grid_side, resolutions, most_tiles(config))
        rules = {"tiling": tiling, "video_token_id": config.video_token_id}
        return super().image_rules() | rules

    def parts(self) -> dict[str, list[nn.Module]]:
        """Modules of each part; every parameter is in exactly one."""
        parts = super().parts()
        return parts | {"projector": [*parts["projector"], self.line_break]}

    @staticmethod
    def check_config(config: Any) -> None:
        """Raise ValueError for a LLaVA-OneVision of other parts than are computed here."""
        check_tower(config)
        most_tiles(config)


class LineBreak(nn.Module):
    """Stock's `image_newline` in a module of its own: by it the vector belongs to a part, and
    under ZeRO-3 it is whole within this forward."""

    def __init__(self, vector: nn.Parameter) -> None:
        super().__init__()
        self.vector = vector

    def forward(self, features: Tensor) -> Tensor:
        """features (N, H) → (N + 1, H), the line break last."""
        return torch.cat((features, self.vector[None].to(features.dtype)))


def most_tiles(config: Any) -> int:
    """How many tiles' features an image may keep. Raises ValueError where config.json says none."""
    found = _RATIO.fullmatch(str(config.vision_aspect_ratio))
    if found is None:
        raise ValueError(
            "model.path: config.json's vision_aspect_ratio must be anyres_max_ and a number for a "
            f"llava_onevision, got {config.vision_aspect_ratio}; take another model"
        )
    return int(found[1])
