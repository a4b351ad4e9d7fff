"""Qwen3-Omni's thinker: a Qwen3-VL-MoE that hears."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, Qwen3OmniMoeThinkerForConditionalGeneration

from .audio_flops import conv2d_audio_flops, tokens_of
from .mixture import Mixture
from .omni import Omni
from .qwen3_audio_tower import TOKENS, audio_features
from .read_config import check_values


class Qwen3OmniMoE(Mixture, Omni):
    """Transformers' Qwen3-Omni-MoE thinker, `self.hf`, fed with packed rows (arXiv 2509.17765)."""

    hf_class = Qwen3OmniMoeThinkerForConditionalGeneration
    model_type = "qwen3_omni_moe_thinker"

    def __init__(self, hf_config: PretrainedConfig, **settings: Any) -> None:
        audio = hf_config.audio_config
        windows = [n for n in range(1, 100) if -(-2 * n // 8) == TOKENS]
        values = (("audio_config.n_window", audio.n_window, tuple(windows)),)
        check_values("a qwen3_omni_moe", values, "take another model")
        super().__init__(hf_config, **settings)

    def audio_features(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """Features (audio tokens, H) of recordings: frames (N, num_mels), lengths on the host."""
        return audio_features(self.hf.model.audio_tower, frames, lengths, self.run_layer)

    def audio_tokens(self, lengths: Tensor) -> Tensor:
        """Tokens (num_audios,) of recordings of so many frames, on the host."""
        return tokens_of(lengths, 2 * self.hf.config.audio_config.n_window)

    def audio_rules(self) -> dict[str, Any]:
        """What the data's processor must say of recordings, by the name of its attribute."""
        return super().audio_rules() | {"audio_chunk": 2 * self.hf.config.audio_config.n_window}

    def parts(self) -> dict[str, list[nn.Module]]:
        """Modules of each part; every parameter is in exactly one."""
        tower, parts = self.hf.model.audio_tower, super().parts()
        convolutions = [tower.conv2d1, tower.conv2d2, tower.conv2d3, tower.conv_out]
        projector = [*parts["projector"], tower.ln_post, tower.proj1, tower.proj2]
        hears = {"audio": [*convolutions, tower.layers], "projector": projector}
        return {"vision": parts.pop("vision"), **hears} | parts | hears

    def flops(self, batch: Mapping[str, Any]) -> float:
        """Forward and backward FLOPs of one packed row, of experts only those that run."""
        audio = self.hf.config.audio_config
        trains, adapted = self.trainable_parts(), self.lora is not None
        heard = conv2d_audio_flops(audio, batch, trains, adapted=adapted)
        return heard + super().flops(batch)

    def heard_rows(self, lengths: Tensor) -> list[tuple[nn.Module, int]]:
        """Modules with linears that recordings run through, and of how many rows."""
        return [(self.hf.model.audio_tower, int(self.audio_tokens(lengths).sum()))]
