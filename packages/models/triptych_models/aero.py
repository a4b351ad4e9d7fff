"""Aero: Whisper's encoder, a linear projector, a Qwen2.5 (LMMs-Lab's Aero-1-Audio).

Transformers has no directory for it: the architecture is its Qwen2AudioForConditionalGeneration
under another model_type, the projector's weights under another name. After `import
triptych_models.aero`, AutoConfig reads a folder as any other.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForMultimodalLM,
    PretrainedConfig,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioModel,
    Qwen2AudioPreTrainedModel,
)
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from .audio_flops import whisper_flops, whisper_rows
from .audio_model import AudioModel
from .flops import language_flops
from .layout import STORED_PREFIXES
from .lora import adapter_flops
from .read_config import check_values
from .whisper_tower import BEHIND, audio_features


class AeroConfig(Qwen2AudioConfig):
    """Qwen2-Audio's config.json; the head is the embedding's where the language model's is."""

    model_type = "aero"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = self.text_config.tie_word_embeddings


class AeroModel(Qwen2AudioModel):
    """Transformers' Qwen2-Audio without a head, to which it renames no weights by its own name."""

    config_class = AeroConfig


class AeroForConditionalGeneration(Qwen2AudioForConditionalGeneration):
    """Transformers' Qwen2-Audio, read and written under Aero's names."""

    config_class = AeroConfig
    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: Any) -> None:
        Qwen2AudioPreTrainedModel.__init__(self, config)
        text = config.text_config
        self.model = AeroModel(config)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()


AutoConfig.register("aero", AeroConfig, exist_ok=True)
AutoModelForMultimodalLM.register(AeroConfig, AeroForConditionalGeneration, exist_ok=True)
register_checkpoint_conversion_mapping(
    "aero",
    [WeightRenaming(f"^{name}", own) for own, name in STORED_PREFIXES["aero"]],
    overwrite=True,
)


class Aero(AudioModel):
    """Aero, `self.hf`, fed with packed rows; the tower's positions do not train, as in stock."""

    hf_class = AeroForConditionalGeneration
    model_type = "aero"
    frames_behind = BEHIND
    dummy_frames = 8
    dummy_tokens = 2

    def __init__(self, hf_config: PretrainedConfig, **settings: Any) -> None:
        audio, text = hf_config.audio_config, hf_config.text_config
        names = ("dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop")
        values = [
            ("audio_config.model_type", audio.model_type, ("qwen2_audio_encoder",)),
            ("text_config.model_type", text.model_type, ("qwen2",)),
            *((f"audio_config.{name}", getattr(audio, name), (0,)) for name in names),
        ]
        check_values("an aero", values, "take another model")
        super().__init__(hf_config, **settings)

    def hidden_states(
        self,
        *,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        audio_features: Tensor | None = None,
        audio_lengths: Tensor | None = None,
        audio_positions: Tensor | None = None,
        audio_sends: Sequence[int] | None = None,
        audio_receives: Sequence[int] | None = None,
        **settings: Any,
    ) -> Tensor:
        """Hidden states (1, T, H) after the final norm, documents kept apart.

        input_ids and position_ids (1, T) int64, cu_seqlens (num_docs + 1,) int32, and
        `insert_audio` of recordings; settings are for each language layer.
        """
        embedded = self.hf.model.language_model.embed_tokens(input_ids)
        heard = self.insert_audio(
            embedded, audio_features, audio_lengths, audio_positions, audio_sends, audio_receives
        )
        return self.run_decoder(heard, position_ids, cu_seqlens, max_seqlen, **settings)

    def audio_features(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """Features (audio tokens, H) of recordings: frames (N, num_mels), lengths on the host."""
        model = self.hf.model
        features = audio_features(model.audio_tower, frames, lengths, self.run_layer)
        projected: Tensor = model.multi_modal_projector(features)
        return projected

    @property
    def stock_frames(self) -> int:
        """To how many frames stock wants recordings padded."""
        return 2 * int(self.hf.config.audio_config.max_source_positions)

    def audio_rules(self) -> dict[str, Any]:
        """What the data's processor must say of recordings, by the name of its attribute."""
        return super().audio_rules() | {"position_axes": 1, "most_frames": self.stock_frames}

    def parts(self) -> dict[str, list[nn.Module]]:
        """Modules of each part; every parameter is in exactly one."""
        model = self.hf.model
        tower = model.audio_tower
        return {
            "audio": [tower.conv1, tower.conv2, tower.embed_positions, tower.layers],
            "projector": [tower.layer_norm, model.multi_modal_projector],
            "language": [model.language_model, self.hf.lm_head],
        }

    def flops(self, batch: Mapping[str, Any]) -> float:
        """Forward and backward FLOPs of one packed row; see triptych_models.flops."""
        config, trains = self.hf.config, self.trainable_parts()
        audio, text, adapted = config.audio_config, config.text_config, self.lora is not None
        weight = "language" in trains and not adapted
        heard = whisper_flops(
            audio,
            batch,
            trains,
            chunk=self.stock_frames,
            output_dim=text.hidden_size,
            adapted=adapted,
        )
        read = language_flops(text, batch, weight=weight, inputs=bool(trains))
        return heard + read + adapter_flops(self, batch)

    def heard_rows(self, lengths: Tensor) -> list[tuple[nn.Module, int]]:
        """Modules with linears that recordings run through, and of how many rows."""
        places, tokens = whisper_rows(lengths, self.stock_frames)
        model = self.hf.model
        return [(model.audio_tower.layers, places), (model.multi_modal_projector, tokens)]
