"""Qwen2.5-Omni's thinker as a packed-sequence module: text, images and sound in, text out."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, Qwen2_5OmniThinkerForConditionalGeneration

from .audio_flops import whisper_flops, whisper_rows
from .audio_tower import audio_features
from .omni import Omni
from .qwen2_5_vl import Qwen2_5VL


class Qwen2_5Omni(Omni, Qwen2_5VL):
    """Transformers' Qwen2.5-Omni thinker, `self.hf`: a Qwen2.5-VL that hears (arXiv 2503.20215).

    The tower's tokens of begin and end, which stock holds and never reads, do not train.
    """

    hf_class = Qwen2_5OmniThinkerForConditionalGeneration
    model_type = "qwen2_5_omni_thinker"

    def __init__(self, hf_config: PretrainedConfig, **settings: Any) -> None:
        super().__init__(hf_config, **settings)
        self.hf.model.audio_tower.audio_bos_eos_token.requires_grad_(False)

    def audio_features(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """Features (audio tokens, H) of recordings: frames (N, num_mels), lengths on the host."""
        return audio_features(self.hf.model.audio_tower, frames, lengths, self.run_layer)

    def parts(self) -> dict[str, list[nn.Module]]:
        """Modules of each part; every parameter is in exactly one."""
        tower = self.hf.model.audio_tower
        hears = [tower.conv1, tower.conv2, tower.audio_bos_eos_token, tower.layers]
        parts = super().parts()
        return {
            "vision": parts["vision"],
            "audio": hears,
            "projector": [*parts["projector"], tower.ln_post, tower.proj],
            "language": parts["language"],
        }

    def flops(self, batch: Mapping[str, Any]) -> float:
        """Forward and backward FLOPs of one packed row; see triptych_models.flops."""
        audio = self.hf.config.audio_config
        return whisper_flops(
            audio,
            batch,
            self.trainable_parts(),
            chunk=2 * audio.n_window,
            output_dim=audio.output_dim,
            adapted=self.lora is not None,
        ) + super().flops(batch)

    def heard_rows(self, lengths: Tensor) -> list[tuple[nn.Module, int]]:
        """Modules with linears that recordings run through, and of how many rows."""
        tower = self.hf.model.audio_tower
        places, tokens = whisper_rows(lengths, 2 * self.hf.config.audio_config.n_window)
        return [(tower.layers, places), (tower.proj, tokens)]
