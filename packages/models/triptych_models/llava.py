"""LLaVA as a packed-sequence module: a SigLIP tower, a projector of two layers, a text model.

The architecture is transformers' own LlavaForConditionalGeneration, arXiv 2310.03744; with
projector_hidden_act "linear" the projector is a linear map. All images are of one size, so that a
tower sees a plain batch of them. The text model is a Qwen3, a Qwen2 or a Llama.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import LlavaForConditionalGeneration, PretrainedConfig

from .flops import Layer, llava_flops
from .image_model import ImageModel
from .layout import tower
from .lora import adapter_flops
from .read_config import check_values
from .sequence import exchange_features
from .vision import normalize_pixels

TEXT_TYPES = ("qwen3", "qwen2", "llama")


class Llava(ImageModel):
    """Transformers' LLaVA with a SigLIP tower, `self.hf`, fed with packed rows.

    Features are those after tower block `vision_feature_layer`; what comes behind it (blocks, the
    last norm) never runs, in stock neither, and does not train. Every rank calls the same
    submodules in the same order on every batch, images or not.
    """

    hf_class = LlavaForConditionalGeneration
    model_type = "llava"
    class_tokens: ClassVar[int] = 0  # of the tower, beside an image's patches

    def __init__(self, hf_config: PretrainedConfig, **settings: Any) -> None:
        self.check_config(hf_config)
        super().__init__(hf_config, **settings)
        self.num_blocks = blocks_that_run(hf_config)
        for idle in self.idle_modules():
            idle.requires_grad_(False)

    def idle_modules(self) -> Sequence[nn.Module]:
        """What of the tower lies behind the features."""
        visual = tower(self.hf)
        return [visual.encoder.layers[self.num_blocks :], visual.post_layernorm]

    @property
    def patch_size(self) -> int:
        """Pixels along a side of every patch."""
        return one_side(self.hf.config.vision_config.patch_size)

    @property
    def grid_side(self) -> int:
        """Patches along a side of every image."""
        return one_side(self.hf.config.vision_config.image_size) // self.patch_size

    @property
    def tokens_per_image(self) -> int:
        """Tokens that stand for an image, as many as the projector gives features."""
        return self.grid_side**2

    def project(self, features: Tensor) -> Tensor:
        """The tower's features (N, P, C) of N images to the language model's (N, tokens, H)."""
        projected: Tensor = self.hf.model.multi_modal_projector(features)
        return projected

    def projector_tokens(self, patches: int) -> int:
        """How many features the projector gives for the patches of whole images."""
        return patches // self.grid_side**2 * self.tokens_per_image

    def projector_layers(self, images: int) -> list[Layer]:
        """The projector's products for so many images, to count their FLOPs."""
        vision, text = self.hf.config.vision_config.hidden_size, self.hf.config.text_config
        rows = images * self.tokens_per_image
        return [
            Layer(rows * vision * text.hidden_size, behind="tower"),
            Layer(rows * text.hidden_size**2, behind="projector"),
        ]

    @staticmethod
    def check_config(config: Any) -> None:
        """Raise ValueError for a LLaVA of other parts than are computed here."""
        check_tower(config)

    def hidden_states(
        self,
        *,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        pixel_values: Tensor | None = None,
        image_positions: Tensor | None = None,
        image_sends: Sequence[int] | None = None,
        image_receives: Sequence[int] | None = None,
        image_grid_thw: Tensor | None = None,
        image_taps: Tensor | None = None,
        image_tap_weights: Tensor | None = None,
        vision_cu_seqlens: Tensor | None = None,
        vision_max_seqlen: int | None = None,
        **settings: Any,
    ) -> Tensor:
        """Hidden states (1, T, H) after the final norm, documents kept apart.

        input_ids and position_ids (1, T) int64, cu_seqlens (num_docs + 1,) int32, pixel_values
        (P, patch_dim) uint8, image_positions (image tokens,) int64, image_taps (image tokens, 4)
        int64 and their weights fp32 of families that arrange features; what a batch
        has of grids is known here. In a sequence group a rank runs the tower on its share of the
        row's images, and image_positions are those of its own tokens. settings are for each
        language layer.
        """
        hidden_states = self.embed(
            input_ids,
            pixel_values,
            image_positions,
            image_sends,
            image_receives,
            image_taps,
            image_tap_weights,
        )
        return self.run_decoder(hidden_states, position_ids, cu_seqlens, max_seqlen, **settings)

    def embed(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_positions: Tensor | None = None,
        image_sends: Sequence[int] | None = None,
        image_receives: Sequence[int] | None = None,
        image_taps: Tensor | None = None,
        image_tap_weights: Tensor | None = None,
    ) -> Tensor:
        """What the language model's first layer is given (1, T, H): embeddings and features."""
        hidden_states = self.hf.model.language_model.embed_tokens(input_ids)  # (1, T, H)
        positions = image_positions
        if positions is None:
            positions = torch.zeros(0, dtype=torch.int64, device=input_ids.device)
        if pixel_values is None:  # a dummy image, of whose features none is kept
            _, pixels = self.dummy_image(input_ids.device)
            features = self._image_features(pixels)[:0]
        else:
            features = self._image_features(pixel_values)
        if image_sends is not None and image_receives is not None:
            features = self.exchange(features, image_sends, image_receives)
        features = self.arrange(features, image_taps, image_tap_weights)
        return hidden_states.index_copy(1, positions, features.to(hidden_states.dtype)[None])

    def arrange(self, features: Tensor, taps: Tensor | None, weights: Tensor | None) -> Tensor:
        """Features in the order of their tokens; here they are so."""
        return features

    def exchange(self, features: Tensor, sends: Sequence[int], receives: Sequence[int]) -> Tensor:
        """Features from the ranks of a sequence group that computed them to those of tokens."""
        return exchange_features([features], sends, receives, self.sequence)[0]

    def image_rules(self) -> dict[str, Any]:
        """What the data's processor must say of images, by the name of its attribute."""
        config = self.hf.config
        return {
            "patch_size": self.patch_size,
            "image_side": one_side(config.vision_config.image_size),
            "image_tokens": self.tokens_per_image,
            "image_token_id": config.image_token_id,
            "position_axes": 1,
        }

    def parts(self) -> dict[str, list[nn.Module]]:
        """Modules of each part; every parameter is in exactly one."""
        model = self.hf.model
        return {
            "vision": [model.vision_tower],
            "projector": [model.multi_modal_projector],
            "language": [model.language_model, self.hf.lm_head],
        }

    def tower_layers(self) -> Sequence[nn.Module]:
        """The layers of the tower that run."""
        blocks: Sequence[nn.Module] = tower(self.hf).encoder.layers[: self.num_blocks]
        return blocks

    def flops(self, batch: Mapping[str, Any]) -> float:
        """Forward and backward FLOPs of one packed row; see triptych_models.flops."""
        parts, adapted = self.trainable_parts(), self.lora is not None
        return llava_flops(
            self.hf.config,
            batch,
            parts,
            num_blocks=self.num_blocks,
            projector=self.projector_layers,
            class_tokens=self.class_tokens,
            adapted=adapted,
        ) + adapter_flops(self, batch)

    def dummy_image(self, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """A black image: grid (1, 3) on the host, uint8 patches on device."""
        vision, side = self.hf.config.vision_config, self.grid_side
        patch_dim = vision.num_channels * self.patch_size**2
        pixels = torch.zeros(side * side, patch_dim, dtype=torch.uint8, device=device)
        with unset_fake_temporarily():  # read on the host, also where a plan runs on fake tensors
            grid = torch.tensor([[1, side, side]])
        return grid, pixels

    def whole_images(self, patches: Tensor) -> Tensor:
        """Patches (N * side**2, C * p * p) put together as stock takes them: (N, C, H, W)."""
        side, patch = self.grid_side, self.patch_size
        cut = patches.view(-1, side, side, self.hf.config.vision_config.num_channels, patch, patch)
        return cut.permute(0, 3, 1, 4, 2, 5).reshape(
            len(cut), cut.shape[3], side * patch, side * patch
        )

    def _image_features(self, pixels: Tensor) -> Tensor:
        """Features (image tokens, H) of the patches (P, patch_dim) uint8 of whole images."""
        visual, patch = tower(self.hf), self.patch_size
        embeddings, num_patches = visual.embeddings, self.grid_side**2
        scaled = normalize_pixels(pixels, self.image_mean, self.image_std)
        scaled = scaled.to(embeddings.patch_embedding.weight.dtype)
        hidden_states = embeddings.patch_embedding(scaled.view(len(scaled), -1, patch, patch))
        hidden_states = hidden_states.view(-1, num_patches, hidden_states.shape[1])
        places = torch.arange(num_patches, device=pixels.device)
        hidden_states = hidden_states + embeddings.position_embedding(places)
        for block in self.tower_layers():
            hidden_states = self.run_layer(block, hidden_states, attention_mask=None)
        return self.project(hidden_states).flatten(0, 1)


def one_side(size: int | Sequence[int]) -> int:
    """The side of a square, which some configurations give twice. Raises ValueError for others."""
    sides = {size} if isinstance(size, int) else {*size}
    if len(sides) != 1:
        raise ValueError(
            f"model.path: config.json's image_size and patch_size must be squares, got {size}; "
            "take another model"
        )
    return int(sides.pop())


def blocks_that_run(config: Any) -> int:
    """How many blocks lie before the features that stock takes."""
    layer, blocks = int(config.vision_feature_layer), int(config.vision_config.num_hidden_layers)
    return layer if layer >= 0 else blocks + 1 + layer


def check_tower(config: Any) -> None:
    """Raise ValueError unless the tower is a SigLIP and its features are whole, and the text model
    one of those that are computed here."""
    layer, vision = config.vision_feature_layer, config.vision_config
    blocks = vision.num_hidden_layers
    values = (
        ("vision_config.model_type", vision.model_type, ("siglip_vision_model",)),
        ("vision_config.vision_use_head", getattr(vision, "vision_use_head", True), (False,)),
        ("vision_config.attention_dropout", vision.attention_dropout, (0.0,)),
        ("text_config.model_type", config.text_config.model_type, TEXT_TYPES),
        ("vision_feature_select_strategy", config.vision_feature_select_strategy, ("full",)),
    )
    remedy = "put one together of such parts with tools/assemble_vlm.py"
    check_values(f"a {config.model_type}", values, remedy)
    if not isinstance(layer, int) or not -blocks <= layer <= blocks or layer == 0:
        raise ValueError(
            "model.path: config.json's vision_feature_layer must be the number of a block "
            f"(1 to {blocks}, or -1 for the last), got {layer}; name one"
        )
