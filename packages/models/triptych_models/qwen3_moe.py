"""Qwen3-MoE (text alone) as a packed-sequence module with its losses inside."""

from collections.abc import Mapping
from pathlib import Path
from types import MethodType
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, Qwen3MoeForCausalLM

from .balance import RouterFigures, Segments, segment_row
from .config import MoEConfig
from .experts import EVERY_EXPERT, ExpertGroup, Experts, MoEBlock, Router
from .flops import qwen3_moe_flops
from .offload import InputStore
from .output import LossOutput
from .packed import PackedModel
from .qwen3 import Qwen3
from .read_config import read_config
from .sequence import ALONE, SequenceGroup


class Qwen3MoE(Qwen3):
    """Transformers' Qwen3-MoE, `self.hf`, fed with packed rows; its sparse blocks are ours.

    Args:
        hf_config: of the whole model.
        dtype: of the weights.
        fused: as in every family; experts run through triptych_kernels either way.
        moe: the routers' losses.
        experts: with whom this rank shares the experts.
    """

    def __init__(
        self,
        hf_config: PretrainedConfig,
        *,
        dtype: torch.dtype,
        fused: bool = True,
        moe: MoEConfig | None = None,
        experts: ExpertGroup = EVERY_EXPERT,
    ) -> None:
        num_experts = hf_config.num_experts
        hf_config.num_experts = 1  # stock blocks are not kept: the smallest there are
        PackedModel.__init__(self, Qwen3MoeForCausalLM, hf_config, dtype=dtype, fused=fused)
        hf_config.num_experts = num_experts
        self.moe = moe or MoEConfig()
        for layer in self.hf.model.layers:
            if hasattr(layer.mlp, "experts"):
                layer.mlp = _block(hf_config, dtype, experts)
                layer.forward = MethodType(_run_sparse, layer)

    @classmethod
    def from_directory(
        cls, path: Path, *, dtype: torch.dtype, fused: bool = True, **settings: Any
    ) -> Self:
        """Build from config.json of a Hugging Face directory.

        Raises ValueError if the directory is not one of a Qwen3-MoE this module computes.
        """
        config = read_config(path, "qwen3_moe")
        if config.hidden_act != "silu":
            raise ValueError(
                f"{path / 'config.json'}: hidden_act must be silu, got {config.hidden_act}; "
                "experts of another activation are not supported"
            )
        return cls(config, dtype=dtype, fused=fused, **settings)

    def forward(self, *, shift_labels: Tensor, num_targets: int, **batch: Any) -> LossOutput:
        """Summed loss of one packed row; in training with the routers' losses, if they count.

        metrics: `balance_loss` and `z_loss`, means over the sparse layers, summed over targets;
        `expert_load` (sparse layers, E), the tokens of each expert.
        """
        self.input_store = InputStore()
        over, sequence = self.moe.aux_over, self.sequence
        segments = segment_row(shift_labels, batch["cu_seqlens"], over, sequence)
        figures: list[RouterFigures] = []
        hidden_states = self.hidden_states(**batch, segments=segments, figures=figures)
        loss_sum = self.hf.lm_head(hidden_states, shift_labels, num_targets)
        if not figures:
            return LossOutput(loss_sum, num_targets, {})
        balance, z, load = (torch.stack(each) for each in zip(*figures, strict=True))
        if self.training:  # what is held out is scored by its own loss
            loss_sum = loss_sum + self.moe.aux_loss * balance.sum() + self.moe.z_loss * z.sum()
        metrics = {"balance_loss": balance.mean(), "z_loss": z.mean(), "expert_load": load}
        return LossOutput(loss_sum, num_targets, {k: v.detach() for k, v in metrics.items()})

    def hidden_states(
        self,
        *,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        **routing: Any,
    ) -> Tensor:
        """As Qwen3's; `segments` and `figures` in routing where routers' figures are wanted."""
        hidden_states = self.hf.model.embed_tokens(input_ids)  # (1, T, H)
        return self.run_decoder(hidden_states, position_ids, cu_seqlens, max_seqlen, **routing)

    def parts(self) -> dict[str, list[nn.Module]]:
        """Experts and routers are parts of their own."""
        model = self.hf.model
        blocks = self.blocks()
        sparse = {id(block) for block in blocks}
        language: list[nn.Module] = [model.embed_tokens, model.norm, self.hf.lm_head]
        for layer in model.layers:
            language += [child for child in layer.children() if id(child) not in sparse]
        return {
            "language": language,
            "router": [block.gate for block in blocks],
            "experts": [block.experts for block in blocks],
        }

    def blocks(self) -> list[MoEBlock]:
        """The sparse layers' blocks, in their order."""
        return [layer.mlp for layer in self.hf.model.layers if isinstance(layer.mlp, MoEBlock)]

    def flops(self, batch: Mapping[str, Any]) -> float:
        """Forward and backward FLOPs of one packed row, of experts only those that run."""
        return qwen3_moe_flops(self.hf.config, batch, self.trainable_parts(), len(self.blocks()))

    def set_mlp_chunks(self, chunks: int) -> None:
        """Refused: a router's figures are those of whole rows."""
        if chunks > 1:
            raise ValueError(
                f"engine.mlp_chunks: must be 1 with experts, got {chunks}; take "
                "engine.checkpointing=full or offload for long rows"
            )

    def _run_layer(
        self,
        layer: nn.Module,
        hidden_states: Tensor,
        *,
        segments: Segments | None = None,
        figures: list[RouterFigures] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if segments is None or not isinstance(getattr(layer, "mlp", None), MoEBlock):
            return super()._run_layer(layer, hidden_states, **kwargs)
        given: Any = super()._run_layer(layer, hidden_states, segments=segments, **kwargs)
        hidden_states, *found = given
        assert figures is not None, "segments are given for figures"
        figures.append(RouterFigures(*found))
        return hidden_states


def _block(config: PretrainedConfig, dtype: torch.dtype, group: ExpertGroup) -> MoEBlock:
    hidden_size, num_experts = config.hidden_size, config.num_experts
    gate = Router(
        num_experts,
        hidden_size,
        config.num_experts_per_tok,
        normalize=config.norm_topk_prob,
        dtype=dtype,
    )
    width = config.moe_intermediate_size
    return MoEBlock(gate, Experts(num_experts, hidden_size, width, dtype=dtype, group=group))


def _run_sparse(
    self: Any,
    hidden_states: Tensor,
    *,
    segments: Segments | None = None,
    sequence: SequenceGroup = ALONE,
    **kwargs: Any,
) -> Any:
    """The forward of a sparse decoder layer; with `segments` it returns the router's figures, too.

    Given back and not kept aside: so they pass checkpointing, ZeRO-3's hooks and the compiler as
    the hidden states do.
    """
    attended, _ = self.self_attn(
        hidden_states=self.input_layernorm(hidden_states), sequence=sequence, **kwargs
    )
    hidden_states = hidden_states + attended
    out, figures = self.mlp(self.post_attention_layernorm(hidden_states), segments, sequence)
    hidden_states = hidden_states + out
    return hidden_states if figures is None else (hidden_states, *figures)
