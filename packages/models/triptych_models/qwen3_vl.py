"""Qwen3-VL (dense) as a packed-sequence module with its loss inside."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import PretrainedConfig, Qwen3VLForConditionalGeneration

from .attention import pack_vision_attention
from .flops import qwen3_vl_flops
from .lora import adapter_flops
from .packed import PackedModel, compile_forward
from .sequence import exchange_features
from .vision import normalize_pixels, vision_features


class HasImageRules(Protocol):
    """What of a data processor must agree with the model."""

    patch_size: int
    merge_size: int
    temporal_patch_size: int
    image_token_id: int


class Qwen3VL(PackedModel):
    """Transformers' Qwen3-VL, `self.hf`, fed with packed rows.

    Every rank calls the same submodules in the same order on every batch, images or not: ZeRO-2
    and ZeRO-3 need that.
    """

    hf_class = Qwen3VLForConditionalGeneration
    model_type = "qwen3_vl"

    def __init__(
        self,
        hf_config: PretrainedConfig,
        *,
        dtype: torch.dtype,
        image_mean: list[float],
        image_std: list[float],
        fused: bool = True,
    ) -> None:
        super().__init__(hf_config, dtype=dtype, fused=fused)
        pack_vision_attention(self.hf)
        self.image_mean = image_mean
        self.image_std = image_std

    @classmethod
    def from_directory(cls, path: Path, **settings: Any) -> Self:
        """As every family's; with preprocessor_config.json, which says how pixels are scaled."""
        mean, std = image_statistics(path)
        return super().from_directory(path, image_mean=mean, image_std=std, **settings)

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
        **settings: Any,
    ) -> Tensor:
        """Hidden states (1, T, H) after the final norm, documents kept apart.

        input_ids (1, T) int64, position_ids (3, 1, T) int64, cu_seqlens (num_docs + 1,) int32,
        pixel_values (P, patch_dim) uint8, image_grid_thw (num_images, 3) int64 on the host,
        vision_cu_seqlens (num_frames + 1,) int32, image_positions (num_image_tokens,) int64.
        In a sequence group (see sequence_batch.take_part) a rank runs the tower on its share of the
        row's images, and image_positions are those of its own tokens. settings are for each of the
        language layers.
        """
        language = self.hf.model.language_model
        hidden_states = language.embed_tokens(input_ids)  # (1, T, H)
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

    def check_processor(self, processor: HasImageRules) -> None:
        """Raise ValueError unless the data's processor cuts images as this model expects."""
        super().check_processor(processor)
        config = self.hf.config
        expected = {
            "patch_size": config.vision_config.patch_size,
            "merge_size": config.vision_config.spatial_merge_size,
            "temporal_patch_size": config.vision_config.temporal_patch_size,
            "image_token_id": config.image_token_id,
        }
        for name, value in expected.items():
            given = getattr(processor, name)
            if given != value:
                raise ValueError(
                    f"model.path: {name} of the processor files must be config.json's {value}, "
                    f"got {given}; take all files of the folder from one model"
                )

    def parts(self) -> dict[str, list[nn.Module]]:
        """Modules of each part; every parameter is in exactly one."""
        visual = self.hf.model.visual
        return {
            "vision": [visual.patch_embed, visual.pos_embed, visual.blocks],
            "projector": [visual.merger, visual.deepstack_merger_list],
            "language": [self.hf.model.language_model, self.hf.lm_head],
        }

    def layers(self) -> list[nn.Module]:
        """Every layer of the tower and of the language model."""
        return [*self.hf.model.visual.blocks, *super().layers()]

    def compile_layers(self) -> None:
        """Compile every layer in place; the tower's for any number of patches."""
        super().compile_layers()
        for block in self.hf.model.visual.blocks:
            compile_forward(block, dynamic=True)

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
            self._run_layer,
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


def image_statistics(path: Path) -> tuple[list[float], list[float]]:
    """Mean and std per channel from preprocessor_config.json, 0.5 where it says nothing."""
    file = path / "preprocessor_config.json"
    preprocessor = json.loads(file.read_text()) if file.is_file() else {}
    half = [0.5, 0.5, 0.5]
    return preprocessor.get("image_mean", half), preprocessor.get("image_std", half)
