"""Qwen3 (dense, text alone) as a packed-sequence module with its loss inside."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import Qwen3ForCausalLM

from .flops import qwen3_flops
from .lora import adapter_flops
from .packed import PackedModel


class Qwen3(PackedModel):
    """Transformers' Qwen3, `self.hf`, fed with packed rows."""

    hf_class = Qwen3ForCausalLM
    model_type = "qwen3"

    def hidden_states(
        self,
        *,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        **settings: Any,
    ) -> Tensor:
        """Hidden states (1, T, H) after the final norm, documents kept apart.

        input_ids and position_ids (1, T) int64, cu_seqlens (num_docs + 1,) int32; settings are for
        each layer.
        """
        hidden_states = self.hf.model.embed_tokens(input_ids)  # (1, T, H)
        return self.run_decoder(hidden_states, position_ids, cu_seqlens, max_seqlen, **settings)

    def parts(self) -> dict[str, list[nn.Module]]:
        """All of it is the language part."""
        return {"language": [self.hf.model, self.hf.lm_head]}

    def flops(self, batch: Mapping[str, Any]) -> float:
        """Forward and backward FLOPs of one packed row; see triptych_models.flops."""
        parts, adapted = self.trainable_parts(), self.lora is not None
        causal = self.diffusion is None
        base = qwen3_flops(self.hf.config, batch, parts, adapted=adapted, causal=causal)
        return base + adapter_flops(self, batch)

    def check_processor(self, processor: Any) -> None:
        """Raise ValueError unless the data's processor makes text alone, of ids that are known."""
        super().check_processor(processor)
        if processor.position_axes != 1:
            raise ValueError(
                "model.path: a model of text alone must have no preprocessor files, got those of "
                "images; take all files of the folder from one model"
            )
