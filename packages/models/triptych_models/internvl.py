"""InternVL 3 as a packed-sequence module: a ViT over square tiles, pixel shuffle, a text model.

The architecture is transformers' own InternVLForConditionalGeneration (arXiv 2504.10479). An image
comes as square tiles, each a whole image to the tower.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import InternVLForConditionalGeneration, PretrainedConfig

from .flops import Layer
from .layout import text_config, tower
from .llava import TEXT_TYPES, Llava
from .read_config import check_values
from .vision import normalize_pixels


class InternVL(Llava):
    """Transformers' InternVL, `self.hf`, fed with packed rows as a LLaVA is."""

    hf_class = InternVLForConditionalGeneration
    model_type = "internvl"
    rope_types = ("default", "dynamic")
    class_tokens = 1

    def __init__(self, hf_config: PretrainedConfig, **settings: Any) -> None:
        rope = text_config(hf_config).rope_parameters
        self.is_dynamic = rope["rope_type"] == "dynamic"
        if self.is_dynamic:  # plain up to max_position_embeddings, and stock's reads the device
            theta = rope["rope_theta"]
            text_config(hf_config).rope_parameters = {"rope_type": "default", "rope_theta": theta}
        super().__init__(hf_config, **settings)

    def idle_modules(self) -> Sequence[nn.Module]:
        """Nothing: the features are the last."""
        return []

    @property
    def tokens_per_image(self) -> int:
        """Tokens that stand for a tile."""
        return self.grid_side**2 // self.shuffled

    @property
    def shuffled(self) -> int:
        """Patches that become one token."""
        return int(1 / self.hf.config.downsample_ratio) ** 2

    def project(self, features: Tensor) -> Tensor:
        """The tower's features (N, 1 + P, C) of N tiles to the language model's (N, tokens, H)."""
        side, ratio = self.grid_side, self.hf.config.downsample_ratio
        features = tower(self.hf).layernorm(features)[:, 1:]
        shuffled = self.hf.model.pixel_shuffle(features.unflatten(1, (side, side)), ratio)
        projected: Tensor = self.hf.model.multi_modal_projector(shuffled.flatten(1, 2))
        return projected

    def projector_layers(self, images: int) -> list[Layer]:
        """The projector's products for so many tiles; a norm that trains is before the first."""
        width = self.hf.config.vision_config.hidden_size * self.shuffled
        hidden, rows = self.hf.config.text_config.hidden_size, images * self.tokens_per_image
        return [Layer(rows * n * hidden, behind="projector") for n in (width, hidden)]

    @staticmethod
    def check_config(config: Any) -> None:
        """Raise ValueError for an InternVL of other parts than are computed here."""
        vision = config.vision_config
        values = (
            ("vision_config.model_type", vision.model_type, ("internvl_vision",)),
            ("vision_config.hidden_dropout_prob", vision.hidden_dropout_prob, (0,)),
            ("vision_config.attention_dropout", vision.attention_dropout, (0,)),
            ("vision_config.projection_dropout", vision.projection_dropout, (0,)),
            ("text_config.model_type", config.text_config.model_type, TEXT_TYPES),
            ("vision_feature_layer", config.vision_feature_layer, (-1,)),
            ("vision_feature_select_strategy", config.vision_feature_select_strategy, ("default",)),
        )
        check_values("an internvl", values, "take another model")

    def run_decoder(
        self,
        hidden_states: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """As every family's; ValueError for rows in which rotary positions could change."""
        longest = text_config(self.hf.config).max_position_embeddings
        if self.is_dynamic and max_seqlen > longest:
            raise ValueError(
                f"data.seq_len: must be at most config.json's max_position_embeddings ({longest}), "
                f"beyond which dynamic rotary positions change, got documents of {max_seqlen}; "
                "take shorter rows"
            )
        return super().run_decoder(
            hidden_states, position_ids, cu_seqlens, max_seqlen, *args, **kwargs
        )

    def tower_layers(self) -> Sequence[nn.Module]:
        """The layers of the tower, all of which run."""
        blocks: Sequence[nn.Module] = tower(self.hf).encoder.layer
        return blocks

    def _image_features(self, pixels: Tensor) -> Tensor:
        """Features (image tokens, H) of the patches (P, patch_dim) uint8 of whole tiles."""
        scaled = normalize_pixels(pixels, self.image_mean, self.image_std)
        hidden_states = tower(self.hf).embeddings(self.whole_images(scaled))
        for block in self.tower_layers():
            hidden_states = self.run_layer(block, hidden_states)
        return self.project(hidden_states).flatten(0, 1)
