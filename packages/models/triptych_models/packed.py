"""What every family is: a transformers model fed with packed rows, its loss inside."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from triptych_kernels import fuse

from .attention import PACKED, register
from .checkpointing import Checkpointed, compile_forward
from .config import LoraConfig
from .head import LossHead
from .layout import decoder, text_config
from .masked_diffusion.config import DiffusionConfig
from .mlp_chunks import chunk_mlp
from .offload import InputStore
from .output import LossOutput
from .read_config import read_config
from .rotary import restore_rotary
from .sequence import ALONE, SequenceGroup, check_heads
from .sequence_batch import take_part

# Of what triptych_kernels.fuse knows: what the language layers have. The loss is LossHead's, and
# packed attention comes by its own name.
FUSED_OPS = ("gated_rms_norm", "rms_norm", "swiglu")

# Keys of config.json that two runs of one model may differ in.
IMMATERIAL = frozenset({"architectures", "dtype", "transformers_version", "use_cache"})


class PackedModel(Checkpointed):
    """A transformers model, `self.hf`; a family says what its parts are and how a row runs.

    The weights are not filled in: see triptych_models.weights.
    """

    hf_class: ClassVar[type[PreTrainedModel]]
    model_type: ClassVar[str]  # of config.json
    rope_types: ClassVar[tuple[str, ...]] = ("default",)  # that the family knows

    def __init__(
        self, hf_config: PretrainedConfig, *, dtype: torch.dtype, fused: bool = True
    ) -> None:
        super().__init__()
        register()
        with no_init_weights():
            self.hf = self.hf_class._from_config(hf_config, dtype=dtype, attn_implementation=PACKED)
        self.hf.lm_head = LossHead(self.hf.lm_head)
        self.hf.tie_weights()
        if fused:
            fuse(self.hf, ops=FUSED_OPS)
        restore_rotary(self.hf)
        self.input_store = InputStore()
        self.sequence = ALONE
        self.lora: LoraConfig | None = None  # see triptych_models.lora
        self.diffusion: DiffusionConfig | None = None  # with it attention looks both ways

    @classmethod
    def from_directory(
        cls, path: Path, *, dtype: torch.dtype, fused: bool = True, **settings: Any
    ) -> Self:
        """Build from the small files of a Hugging Face directory.

        Raises ValueError if the directory is not one of a model this family computes.
        """
        config = read_config(path, cls.model_type, cls.rope_types)
        return cls(config, dtype=dtype, fused=fused, **settings)

    def hidden_states(self, *args: Any, **batch: Any) -> Tensor:
        """Hidden states (1, T, H) after the final norm, documents kept apart."""
        raise NotImplementedError

    def parts(self) -> dict[str, list[nn.Module]]:
        """Modules of each part; every parameter is in exactly one."""
        raise NotImplementedError

    def flops(self, batch: Mapping[str, Any]) -> float:
        """Forward and backward FLOPs of one packed row; see triptych_models.flops."""
        raise NotImplementedError

    def fingerprint(self) -> dict[str, Any]:
        """What the weights mean: config.json, less what does not change a number."""
        adapters = {}
        if self.lora is not None:
            adapters["lora"] = self.lora.model_dump(exclude={"merge"}, exclude_none=True)
        noise = {}
        if self.diffusion is not None:
            noise["diffusion"] = {"predict": self.diffusion.predict, "mask": self.mask_token_id}
        return _without(self.hf.config.to_diff_dict(), IMMATERIAL) | adapters | noise

    @property
    def mask_token_id(self) -> int:
        """What stands for a masked token, of a model of masked diffusion."""
        assert self.diffusion is not None
        return self.diffusion.mask(text_config(self.hf.config).vocab_size)

    def check_processor(self, processor: Any) -> None:
        """Raise ValueError unless the data's processor makes what this model expects.

        Of this one all token ids must be below the rows of the embedding: beyond them a device
        reads what is not there. And a mask that was not named is no token of the tokenizer.
        processor has `vocab_size` and `position_axes`.
        """
        rows = text_config(self.hf.config).vocab_size
        if processor.vocab_size > rows:
            raise ValueError(
                f"model.path: the tokenizer's ids must be below config.json's vocab_size ({rows}), "
                f"got {processor.vocab_size}; take all files of the folder from one model"
            )
        diffusion = self.diffusion
        if diffusion and diffusion.mask_token_id is None and processor.vocab_size == rows:
            raise ValueError(
                f"model.diffusion.mask_token_id: must name a token, got none for a tokenizer that "
                f"uses all {rows} rows of the embedding; take a token that no text has"
            )

    def forward(
        self,
        *,
        shift_labels: Tensor,
        num_targets: int,
        target_weights: Tensor | None = None,
        num_masked: int | None = None,
        **batch: Any,
    ) -> LossOutput:
        """Summed loss of one packed row.

        shift_labels (1, T) int64; the rest of the batch as in `hidden_states`. Of masked diffusion
        also target_weights (1, T) fp32, and num_masked labels: num_targets then says what the sum
        is divided by.
        """
        self.input_store = InputStore()
        hidden_states = self.hidden_states(**batch)
        num_labels = num_targets if num_masked is None else num_masked
        loss_sum = self.hf.lm_head(hidden_states, shift_labels, num_labels, target_weights)
        return LossOutput(loss_sum, num_targets, {})

    def after_update(self, figures: Mapping[str, Tensor], taken: Tensor) -> None:
        """Called once a step with its metrics over all ranks, and () 1.0 if weights were updated.

        For what no gradient moves; here there is nothing.
        """

    def logits(self, **batch: Any) -> Tensor:
        """Logits (1, T, V) of one packed row; takes what `hidden_states` takes."""
        return self.hf.lm_head(self.hidden_states(**batch))

    def layers(self) -> list[nn.Module]:
        """Every layer: what repeats, and runs as a whole."""
        return list(decoder(self.hf).layers)

    def compile_layers(self) -> None:
        """Compile every layer in place."""
        self.is_compiled = True
        for layer in decoder(self.hf).layers:
            compile_forward(layer)

    def set_mlp_chunks(self, chunks: int) -> None:
        """Let the language layers' MLPs take a row in chunks; once, before layers compile."""
        if chunks > 1:
            for layer in decoder(self.hf).layers:
                chunk_mlp(layer.mlp, chunks)

    def set_sequence(self, group: SequenceGroup) -> None:
        """Say with whom this rank shares its rows; batches are then what `take_part` gives.

        Raises ValueError where the heads cannot be dealt to the group's ranks.
        """
        check_heads(text_config(self.hf.config).num_attention_heads, group.size)
        self.sequence = group

    def take_part(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """What of a row, on the host, this rank computes; see sequence_batch.take_part."""
        return take_part(batch, self.sequence)

    def trainable_parts(self) -> set[str]:
        """Names of the parts that have a parameter which trains."""
        return {
            name
            for name, modules in self.parts().items()
            if any(p.requires_grad for module in modules for p in module.parameters())
        }

    def run_decoder(
        self,
        hidden_states: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        after_layer: Callable[[int, Tensor], Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Embedded tokens (1, T, H) through all layers and the final norm.

        after_layer(index, hidden_states) is what goes on after each layer; kwargs are a family's
        own, for each layer.
        """
        language = decoder(self.hf)
        rotary = language.rotary_emb(hidden_states, position_ids)
        for index, layer in enumerate(language.layers):
            hidden_states = self.run_layer(
                layer,
                hidden_states,
                position_embeddings=rotary,
                attention_mask=None,
                cu_seqlens=cu_seqlens,
                max_seqlen=max_seqlen,
                sequence=self.sequence,
                causal=self.diffusion is None,
                **kwargs,
            )
            if after_layer is not None:
                hidden_states = after_layer(index, hidden_states)
        return language.norm(hidden_states)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # behind .to(), .bfloat16(), .cuda()
        restore_rotary(self.hf)
        return self


def _without(tree: dict[str, Any], keys: frozenset[str]) -> dict[str, Any]:
    return {
        key: _without(value, keys) if isinstance(value, dict) else value
        for key, value in tree.items()
        if key not in keys
    }
