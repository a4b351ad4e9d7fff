"""Qwen3-VL (dense) as a packed-sequence module with its loss inside."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import PretrainedConfig, Qwen3VLForConditionalGeneration

from .attention import pack_vision_attention
from .flops import qwen3_vl_flops
from .image_model import ImageModel
from .lora import adapter_flops
from .sequence import exchange_features
from .vision import normalize_pixels, vision_features


class Qwen3VL(ImageModel):
    """Transformers' Qwen3-VL, `self.hf`, fed with packed rows.

    Every rank calls the same submodules in the same order on every batch, images or not: ZeRO-2
    and ZeRO-3 need that.
    """

    hf_class = Qwen3VLForConditionalGeneration
    model_type = "qwen3_vl"

    def __init__(self, hf_config: PretrainedConfig, **settings: Any) -> None:
        super().__init__(hf_config, **settings)
        pack_vision_attention(self.hf)

    def hidden_states(
        self,
        *,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        vision_cu_seqlens: Tensor | None = None,
        vision_max_seqlen: int | None = None,
        image_positions: Tensor | None = None,
        image_sends: Sequence[int] | None = None,
        image_receives: Sequence[int] | None = None,
        embedded: Tensor | None = None,
        **settings: Any,
    ) -> Tensor:
        """Hidden states (1, T, H) after the final norm, documents kept apart.

        input_ids (1, T) int64, position_ids (3, 1, T) int64, cu_seqlens (num_docs + 1,) int32,
        pixel_values (P, patch_dim) uint8, image_grid_thw (num_images, 3) int64 on the host,
        vision_cu_seqlens (num_frames + 1,) int32, image_positions (num_image_tokens,) int64.
        In a sequence group (see sequence_batch.take_part) a rank runs the tower on its share of the
        row's images, and image_positions are those of its own tokens. embedded (1, T, H) is what to
        take instead of the tokens' embeddings; settings are for each of the language layers.
        """
        hidden_states = embedded
        if hidden_states is None:
            hidden_states = self.hf.model.language_model.embed_tokens(input_ids)  # (1, T, H)
        positions = image_positions
        if positions is None:
            positions = torch.zeros(0, dtype=torch.int64, device=input_ids.device)
        if pixel_values is None:
            features, deepstack = self._no_image_features(input_ids.device)
        else:
            assert image_grid_thw is not None and vision_cu_seqlens is not None
            assert vision_max_seqlen is not None
            features, deepstack = self._image_features(
                pixel_values, image_grid_thw, vision_cu_seqlens, vision_max_seqlen
            )
        if image_sends is not None and image_receives is not None:
            features, *deepstack = exchange_features(
                [features, *deepstack], image_sends, image_receives, self.sequence
            )
        features = features.to(hidden_states.dtype)[None]  # (1, M, H)
        hidden_states = hidden_states.index_copy(1, positions, features)

        def add_deepstack(index: int, hidden_states: Tensor) -> Tensor:
            if index >= len(deepstack):
                return hidden_states
            tapped = deepstack[index].to(hidden_states.dtype)[None]
            return hidden_states.index_add(1, positions, tapped)

        return self.run_decoder(
            hidden_states, position_ids, cu_seqlens, max_seqlen, add_deepstack, **settings
        )

    def image_rules(self) -> dict[str, Any]:
        """What the data's processor must say of images, by the name of its attribute."""
        config = self.hf.config
        return {
            "patch_size": config.vision_config.patch_size,
            "merge_size": config.vision_config.spatial_merge_size,
            "temporal_patch_size": config.vision_config.temporal_patch_size,
            "image_token_id": config.image_token_id,
        }

    def parts(self) -> dict[str, list[nn.Module]]:
        """Modules of each part; every parameter is in exactly one."""
        visual = self.hf.model.visual
        return {
            "vision": [visual.patch_embed, visual.pos_embed, visual.blocks],
            "projector": [visual.merger, visual.deepstack_merger_list],
            "language": [self.hf.model.language_model, self.hf.lm_head],
        }

    def tower_layers(self) -> Sequence[nn.Module]:
        """The layers of the tower that run."""
        blocks: Sequence[nn.Module] = self.hf.model.visual.blocks
        return blocks

    def flops(self, batch: Mapping[str, Any]) -> float:
        """Forward and backward FLOPs of one packed row; see triptych_models.flops."""
        parts, adapted = self.trainable_parts(), self.lora is not None
        return qwen3_vl_flops(self.hf.config, batch, parts, adapted=adapted) + adapter_flops(
            self, batch
        )

    def dummy_image(self, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """A black image that makes one token: grid (1, 3) on the host, uint8 patches on device."""
        vision = self.hf.config.vision_config
        m = vision.spatial_merge_size
        patch_dim = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        pixels = torch.zeros(m * m, patch_dim, dtype=torch.uint8, device=device)
        with unset_fake_temporarily():  # read on the host, also where a plan runs on fake tensors
            grid = torch.tensor([[1, m, m]])
        return grid, pixels

    def _image_features(
        self, pixel_values: Tensor, grid_thw: Tensor, cu_seqlens: Tensor, max_seqlen: int
    ) -> tuple[Tensor, list[Tensor]]:
        return vision_features(
            self.hf.model.visual,
            normalize_pixels(pixel_values, self.image_mean, self.image_std),
            grid_thw,
            cu_seqlens,
            max_seqlen,
            self.run_layer,
        )

    def _no_image_features(self, device: torch.device) -> tuple[Tensor, list[Tensor]]:
        """Run the tower on a dummy image and keep none of its features.

        What goes on is empty but still hangs on the graph, so the tower's gradients are zeros
        and its modules ran as on any other rank.
        """
        grid, pixels = self.dummy_image(device)
        patches = len(pixels)
        features, deepstack = self._image_features(
            pixels,
            grid,
            torch.arange(0, 2 * patches, patches, dtype=torch.int32, device=device),  # [0, patches]
            patches,
        )
        return features[:0], [x[:0] for x in deepstack]
