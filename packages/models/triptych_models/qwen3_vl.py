"""Qwen3-VL (dense) as a packed-sequence module with its loss inside."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, Qwen3VLForConditionalGeneration
from transformers.initialization import no_init_weights

from triptych_kernels import fuse

from .attention import PACKED, pack_vision_attention, register
from .checkpointing import Checkpointing, run_layer
from .flops import qwen3_vl_flops
from .head import LossHead
from .output import LossOutput
from .rotary import restore_rotary
from .vision import normalize_pixels, vision_features

# Of what triptych_kernels.fuse knows: what the language layers have. The loss is LossHead's, and
# packed attention comes by its own name.
FUSED_OPS = ("rms_norm", "swiglu")


class HasImageRules(Protocol):
    """What of a data processor must agree with the model."""

    patch_size: int
    merge_size: int
    temporal_patch_size: int
    image_token_id: int


class Qwen3VL(nn.Module):
    """Transformers' Qwen3-VL, `self.hf`, fed with packed rows.

    Every rank calls the same submodules in the same order on every batch, images or not: ZeRO-2
    and ZeRO-3 need that. The weights are not filled in: see triptych_models.weights.
    """

    def __init__(
        self,
        hf_config: PretrainedConfig,
        *,
        dtype: torch.dtype,
        image_mean: list[float],
        image_std: list[float],
        fused: bool = True,
    ) -> None:
        super().__init__()
        register()
        with no_init_weights():
            self.hf = Qwen3VLForConditionalGeneration._from_config(
                hf_config, dtype=dtype, attn_implementation=PACKED
            )
        self.hf.lm_head = LossHead(self.hf.lm_head)
        self.hf.tie_weights()
        pack_vision_attention(self.hf)
        if fused:
            fuse(self.hf, ops=FUSED_OPS)
        restore_rotary(self.hf)
        self.image_mean = image_mean
        self.image_std = image_std
        self.checkpointing: Checkpointing = "none"

    @classmethod
    def from_directory(
        cls,
        path: Path,
        *,
        dtype: torch.dtype,
        fused: bool = True,
    ) -> Self:
        """Build from config.json and preprocessor_config.json of a Hugging Face directory.

        Raises ValueError if the directory is not one of a Qwen3-VL this module computes.
        """
        mean, std = image_statistics(path)
        return cls(
            read_config(path),
            dtype=dtype,
            image_mean=mean,
            image_std=std,
            fused=fused,
        )

    def forward(self, *, shift_labels: Tensor, num_targets: int, **batch: Any) -> LossOutput:
        """Summed loss of one packed row.

        shift_labels (1, T) int64; the rest of the batch as in `hidden_states`.
        """
        hidden_states = self.hidden_states(**batch)
        loss_sum = self.hf.lm_head(hidden_states, shift_labels, num_targets)
        return LossOutput(loss_sum, num_targets, {})

    def logits(self, **batch: Any) -> Tensor:
        """Logits (1, T, V) of one packed row; takes what `hidden_states` takes."""
        return self.hf.lm_head(self.hidden_states(**batch))

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
    ) -> Tensor:
        """Hidden states (1, T, H) after the final norm, documents kept apart.

        input_ids (1, T) int64, position_ids (3, 1, T) int64, cu_seqlens (num_docs + 1,) int32,
        pixel_values (P, patch_dim) uint8, image_grid_thw (num_images, 3) int64 on the host,
        vision_cu_seqlens (num_frames + 1,) int32, image_positions (num_image_tokens,) int64.
        """
        language = self.hf.model.language_model
        hidden_states = language.embed_tokens(input_ids)  # (1, T, H)
        if pixel_values is None:
            positions, features, deepstack = self._no_image_features(input_ids.device)
        else:
            assert image_grid_thw is not None and vision_cu_seqlens is not None
            assert vision_max_seqlen is not None and image_positions is not None
            positions = image_positions
            features, deepstack = self._image_features(
                pixel_values, image_grid_thw, vision_cu_seqlens, vision_max_seqlen
            )
        features = features.to(hidden_states.dtype)[None]  # (1, M, H)
        hidden_states = hidden_states.index_copy(1, positions, features)

        rotary = language.rotary_emb(hidden_states, position_ids)
        for index, layer in enumerate(language.layers):
            hidden_states = self._run_layer(
                layer,
                hidden_states,
                position_embeddings=rotary,
                attention_mask=None,
                cu_seqlens=cu_seqlens,
                max_seqlen=max_seqlen,
            )
            if index < len(deepstack):
                features = deepstack[index].to(hidden_states.dtype)[None]
                hidden_states = hidden_states.index_add(1, positions, features)
        return language.norm(hidden_states)

    def check_processor(self, processor: HasImageRules) -> None:
        """Raise ValueError unless the data's processor cuts images as this model expects."""
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
        """Every layer of the tower and of the language model: what repeats, and runs as a whole."""
        return [*self.hf.model.visual.blocks, *self.hf.model.language_model.layers]

    def compile_layers(self) -> None:
        """Compile every layer in place; the tower's for any number of patches."""
        for layer in self.hf.model.language_model.layers:
            layer.compile()
        for block in self.hf.model.visual.blocks:
            block.compile(dynamic=True)

    def set_checkpointing(self, checkpointing: Checkpointing) -> None:
        """Say what every layer keeps for its backward; see triptych_models.checkpointing."""
        self.checkpointing = checkpointing

    def flops(self, batch: Mapping[str, Any]) -> float:
        """Forward and backward FLOPs of one packed row; see triptych_models.flops."""
        trainable = {
            name
            for name, modules in self.parts().items()
            if any(p.requires_grad for module in modules for p in module.parameters())
        }
        return qwen3_vl_flops(self.hf.config, batch, trainable)

    def dummy_image(self, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """A black image that makes one token: grid (1, 3) on the host, uint8 patches on device."""
        vision = self.hf.config.vision_config
        m = vision.spatial_merge_size
        patch_dim = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        pixels = torch.zeros(m * m, patch_dim, dtype=torch.uint8, device=device)
        return torch.tensor([[1, m, m]]), pixels

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

    def _no_image_features(self, device: torch.device) -> tuple[Tensor, Tensor, list[Tensor]]:
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
        positions = torch.zeros(0, dtype=torch.int64, device=device)
        return positions, features[:0], [x[:0] for x in deepstack]

    def _run_layer(
        self, layer: Callable[..., Tensor], hidden_states: Tensor, **kwargs: Any
    ) -> Tensor:
        checkpointing = self.checkpointing if self.training else "none"
        return run_layer(checkpointing, layer, hidden_states, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # behind .to(), .bfloat16(), .cuda()
        restore_rotary(self.hf)
        return self


def read_config(path: Path) -> PretrainedConfig:
    """Read config.json; ValueError unless it is a Qwen3-VL with plain rotary and no dropout."""
    file = path / "config.json"
    if not file.is_file():
        raise ValueError(f"model.path: must hold a config.json, got {path}; name a model directory")
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    if config.model_type != "qwen3_vl":
        raise ValueError(
            f"{file}: model_type must be qwen3_vl, got {config.model_type}; "
            "set model.family to what the directory holds"
        )
    text = config.text_config
    if text.rope_parameters["rope_type"] != "default":
        raise ValueError(
            f"{file}: text_config rope_type must be default, got "
            f"{text.rope_parameters['rope_type']}; scaled rotary positions are not supported"
        )
    if text.attention_dropout:
        raise ValueError(
            f"{file}: text_config.attention_dropout must be 0, got {text.attention_dropout}; "
            "packed attention has no dropout"
        )
    return config


def image_statistics(path: Path) -> tuple[list[float], list[float]]:
    """Mean and std per channel from preprocessor_config.json, 0.5 where it says nothing."""
    file = path / "preprocessor_config.json"
    preprocessor = json.loads(file.read_text()) if file.is_file() else {}
    half = [0.5, 0.5, 0.5]
    return preprocessor.get("image_mean", half), preprocessor.get("image_std", half)
