"""What Qwen's omni thinkers share: a Qwen-VL that hears."""

from collections.abc import Sequence
from typing import Any

import transformers
from torch import Tensor
from transformers import PretrainedConfig

from .attention import pack_audio_attention
from .audio_model import AudioModel
from .qwen3_vl import Qwen3VL

OLDEST = (5, 21)  # of transformers: before it, thinkers had their parts elsewhere


class Omni(AudioModel, Qwen3VL):
    """The thinker of an omni model, `self.hf`: text, images and sound in, text out."""

    def __init__(self, hf_config: PretrainedConfig, **settings: Any) -> None:
        version = transformers.__version__
        if tuple(map(int, version.split(".")[:2])) < OLDEST:
            raise ValueError(
                f"model.path: a {self.model_type} must have transformers 5.21 or newer, got "
                f"{version}; run: pip install -U transformers"
            )
        super().__init__(hf_config, **settings)
        pack_audio_attention(self.hf)

    def hidden_states(
        self,
        *,
        input_ids: Tensor,
        audio_features: Tensor | None = None,
        audio_lengths: Tensor | None = None,
        audio_positions: Tensor | None = None,
        audio_sends: Sequence[int] | None = None,
        audio_receives: Sequence[int] | None = None,
        **batch: Any,
    ) -> Tensor:
        """Hidden states (1, T, H) after the final norm, documents kept apart.

        As `Qwen3VL.hidden_states`, and `insert_audio` of recordings; position_ids may also be
        float32, of a Qwen3-Omni.
        """
        embedded = self.hf.model.language_model.embed_tokens(input_ids)
        heard = self.insert_audio(
            embedded, audio_features, audio_lengths, audio_positions, audio_sends, audio_receives
        )
        return super().hidden_states(input_ids=input_ids, embedded=heard, **batch)
