"""What families that hear share: their features among the tokens, the processor they need."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from .audio_tower import halve
from .checkpointing import compile_forward
from .layout import ear
from .packed import PackedModel
from .sequence import exchange_features
from .sequence_batch import take_part


class AudioModel(PackedModel):
    """A packed model with an audio tower, fed with log-mel frames.

    Every rank calls the tower on every batch, recordings or not: ZeRO-2 and ZeRO-3 need that.
    """

    frames_behind: ClassVar[int] = 0  # of silence, that come with each recording
    dummy_frames: ClassVar[int] = 4
    dummy_tokens: ClassVar[int] = 1  # that those become

    def audio_features(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """Features (audio tokens, H) of recordings: frames (N, num_mels), lengths on the host."""
        raise NotImplementedError

    def take_part(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """What of a row, on the host, this rank computes; see sequence_batch.take_part."""
        return take_part(batch, self.sequence, self.audio_tokens)

    def heard_rows(self, lengths: Tensor) -> list[tuple[nn.Module, int]]:
        """Modules with linears that recordings run through, and of how many rows, for recordings
        of lengths (num_audios,) int64 frames on the host."""
        raise NotImplementedError

    def audio_tokens(self, lengths: Tensor) -> Tensor:
        """Tokens (num_audios,) of recordings of so many frames, on the host."""
        return halve(lengths) // 2

    def audio_rules(self) -> dict[str, Any]:
        """What the data's processor must say of recordings, by the name of its attribute."""
        config = self.hf.config
        return {
            "num_mels": config.audio_config.num_mel_bins,
            "audio_token_id": config.audio_token_id,
            "audio_chunk": None,
            "frames_behind": self.frames_behind,
        }

    @property
    def stock_frames(self) -> int | None:
        """To how many frames stock wants recordings padded; None: to the longest of a batch."""
        return None

    def insert_audio(
        self,
        hidden_states: Tensor,
        audio_features: Tensor | None,
        audio_lengths: Tensor | None,
        audio_positions: Tensor | None,
        audio_sends: Sequence[int] | None = None,
        audio_receives: Sequence[int] | None = None,
    ) -> Tensor:
        """Embedded tokens (1, T, H) with what was heard in the places of the audio tokens.

        audio_features (N, num_mels) float, audio_lengths (num_audios,) int64 on the host: frames of
        each, beside `frames_behind`; audio_positions (audio tokens,) int64. None in a row without
        recordings. In a sequence group a rank runs the tower on its share of the row's, and
        audio_positions are those of its own tokens.
        """
        device = hidden_states.device
        positions = audio_positions
        if positions is None:
            positions = torch.zeros(0, dtype=torch.int64, device=device)
        # Of a dummy no feature is kept, but they hang on the graph.
        if audio_features is None:
            features = self.audio_features(*self.dummy_audio(device))[:0]
        else:
            assert audio_lengths is not None
            features = self.audio_features(audio_features, audio_lengths)
        if audio_sends is not None and audio_receives is not None:
            (features,) = exchange_features([features], audio_sends, audio_receives, self.sequence)
        return hidden_states.index_copy(1, positions, features.to(hidden_states.dtype)[None])

    def dummy_audio(self, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Silence of few tokens: its frames (N, num_mels) on device, and their number (1,) on the
        host."""
        frames = self.dummy_frames
        num_mels = self.hf.config.audio_config.num_mel_bins
        with unset_fake_temporarily():  # read on the host, also where a plan runs on fake tensors
            lengths = torch.tensor([frames])
        return torch.zeros(frames + self.frames_behind, num_mels, device=device), lengths

    def audio_layers(self) -> Sequence[nn.Module]:
        """The layers of the audio tower."""
        layers: Sequence[nn.Module] = ear(self.hf).layers
        return layers

    def layers(self) -> list[nn.Module]:
        """Every layer that runs: of the audio tower, and of the rest."""
        return [*self.audio_layers(), *super().layers()]

    def compile_layers(self) -> None:
        """Compile every layer in place; the tower's for any number of frames."""
        super().compile_layers()
        for layer in self.audio_layers():
            compile_forward(layer, dynamic=True)

    def check_processor(self, processor: Any) -> None:
        """Raise ValueError unless the data's processor makes of recordings what this model
        expects; one that takes none will do."""
        super().check_processor(processor)
        if not processor.num_mels:
            return
        for name, value in self.audio_rules().items():
            given = getattr(processor, name)
            if given != value:
                raise ValueError(
                    f"model.path: {name} of the processor files must be config.json's {value}, "
                    f"got {given}; take all files of the folder from one model"
                )
