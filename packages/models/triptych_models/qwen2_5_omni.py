"""Qwen2.5-Omni's thinker as a packed-sequence module: text, images and sound in, text out."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, Qwen2_5OmniThinkerForConditionalGeneration

from .attention import pack_audio_attention
from .audio_flops import audio_flops
from .audio_model import AudioModel
from .audio_tower import audio_features
from .qwen2_5_vl import Qwen2_5VL


class Qwen2_5Omni(AudioModel, Qwen2_5VL):
    """Transformers' Qwen2.5-Omni thinker, `self.hf`: a Qwen2.5-VL that hears (arXiv 2503.20215).

    The tower's tokens of begin and end, which stock holds and never reads, do not train.
    """

    hf_class = Qwen2_5OmniThinkerForConditionalGeneration
    model_type = "qwen2_5_omni_thinker"

    def __init__(self, hf_config: PretrainedConfig, **settings: Any) -> None:
        super().__init__(hf_config, **settings)
        pack_audio_attention(self.hf)
        self.hf.model.audio_tower.audio_bos_eos_token.requires_grad_(False)

    def hidden_states(
        self,
        *,
        input_ids: Tensor,
        audio_features: Tensor | None = None,
        audio_lengths: Tensor | None = None,
        audio_positions: Tensor | None = None,
        **batch: Any,
    ) -> Tensor:
        """Hidden states (1, T, H) after the final norm, documents kept apart.

        As `Qwen3VL.hidden_states`, and `insert_audio` of recordings.
        """
        embedded = self.hf.model.language_model.embed_tokens(input_ids)
        heard = self.insert_audio(embedded, audio_features, audio_lengths, audio_positions)
        return super().hidden_states(input_ids=input_ids, embedded=heard, **batch)

    def audio_features(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """Features (audio tokens, H) of recordings: frames (N, num_mels), lengths on the host."""
        return audio_features(self.hf.model.audio_tower, frames, lengths, self._run_layer)

    def audio_rules(self) -> dict[str, Any]:
        """What the data's processor must say of recordings, by the name of its attribute."""
        config = self.hf.config
        return {
            "num_mels": config.audio_config.num_mel_bins,
            "audio_token_id": config.audio_token_id,
            "audio_chunk": None,
        }

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
        config, adapted = self.hf.config.audio_config, self.lora is not None
        hears = audio_flops(config, batch, self.trainable_parts(), adapted=adapted)
        return hears + super().flops(batch)
