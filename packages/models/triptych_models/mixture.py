"""What every mixture of experts is beside its dense family: sparse blocks, and routers' losses.

A mixture is a class of both, `class Qwen3MoE(Mixture, Qwen3)`, which names the stock model, its
model_type, and how directories hold the experts.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MethodType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from .balance import RouterFigures, Segments, segment_row
from .config import MoEConfig
from .experts import EVERY_EXPERT, ExpertGroup, Experts, MoEBlock, Router, SharedGate
from .flops import mixture_flops, vision_flops
from .layout import (
    MixtureShape,
    StoredExperts,
    decoder,
    experts_key,
    mixture_shape,
    text_config,
    tower,
)
from .lora import adapter_flops
from .offload import InputStore
from .output import LossOutput
from .packed import PackedModel
from .sequence import ALONE, SequenceGroup


class Mixture(PackedModel):
    """Transformers' mixture, `self.hf`, fed with packed rows; its sparse blocks are ours.

    Args:
        hf_config: of the whole model.
        moe: the routers' losses.
        experts: with whom this rank shares the experts.
        settings: as the dense family's.
    """

    stored: ClassVar[StoredExperts] = StoredExperts()

    def __init__(
        self,
        hf_config: PretrainedConfig,
        *,
        dtype: torch.dtype,
        moe: MoEConfig | None = None,
        experts: ExpertGroup = EVERY_EXPERT,
        **settings: Any,
    ) -> None:
        text = text_config(hf_config)
        shape = mixture_shape(text)
        setattr(text, experts_key(text), 1)  # stock blocks are not kept: the smallest there are
        super().__init__(hf_config, dtype=dtype, **settings)
        setattr(text, experts_key(text), shape.num_experts)
        self.moe = moe or MoEConfig()
        for layer in decoder(self.hf).layers:
            if hasattr(layer.mlp, "experts"):
                layer.mlp = self._block(layer.mlp, shape, dtype, experts)
                layer.forward = MethodType(_run_sparse, layer)

    @classmethod
    def from_directory(cls, path: Path, **settings: Any) -> Self:
        """As every family's; also ValueError for experts of another activation than SiLU."""
        model = super().from_directory(path, **settings)
        text = text_config(model.hf.config)
        if text.hidden_act != "silu":
            raise ValueError(
                f"{path / 'config.json'}: hidden_act must be silu, got {text.hidden_act}; "
                "experts of another activation are not supported"
            )
        return model

    def forward(self, *, shift_labels: Tensor, num_targets: int, **batch: Any) -> LossOutput:
        """Summed loss of one packed row; in training with the routers' losses, if they count.

        metrics: `balance_loss` and `z_loss`, means over the sparse layers, summed over targets;
        `expert_load` (sparse layers, E), the tokens of each expert, and where the model sees images
        `expert_load_images`, those of them that are an image's.
        """
        self.input_store = InputStore()
        over, sequence = self.moe.aux_over, self.sequence
        images = batch.get("image_positions")
        segments = segment_row(shift_labels, batch["cu_seqlens"], over, sequence, images)
        figures: list[RouterFigures] = []
        hidden_states = self.hidden_states(**batch, segments=segments, figures=figures)
        loss_sum = self.hf.lm_head(hidden_states, shift_labels, num_targets)
        if not figures:
            return LossOutput(loss_sum, num_targets, {})
        balance, z, load = (torch.stack(each) for each in zip(*figures, strict=True))
        if self.training:  # what is held out is scored by its own loss
            loss_sum = loss_sum + self.moe.aux_loss * balance.sum() + self.moe.z_loss * z.sum()
        metrics = {"balance_loss": balance.mean(), "z_loss": z.mean(), "expert_load": load.sum(1)}
        if tower(self.hf) is not None:  # of text alone too: all ranks report the same
            metrics["expert_load_images"] = load[:, 1]
        return LossOutput(loss_sum, num_targets, {k: v.detach() for k, v in metrics.items()})

    def parts(self) -> dict[str, list[nn.Module]]:
        """Experts and routers are parts of their own; what all tokens share is language's."""
        model, blocks = decoder(self.hf), self.blocks()
        sparse = {id(block) for block in blocks}
        language: list[nn.Module] = [model.embed_tokens, model.norm, self.hf.lm_head]
        for layer in model.layers:
            language += [child for child in layer.children() if id(child) not in sparse]
        for block in blocks:
            shared = (block.shared_expert, block.shared_experts)
            language += [module for module in shared if module is not None]
        gates = [block.shared_expert_gate for block in blocks]
        return {
            **super().parts(),
            "language": language,
            "router": [
                *(block.gate for block in blocks),
                *(gate for gate in gates if gate is not None),
            ],
            "experts": [block.experts for block in blocks],
        }

    def blocks(self) -> list[MoEBlock]:
        """The sparse layers' blocks, in their order."""
        return [layer.mlp for layer in decoder(self.hf).layers if isinstance(layer.mlp, MoEBlock)]

    def flops(self, batch: Mapping[str, Any]) -> float:
        """Forward and backward FLOPs of one packed row, of experts only those that run."""
        config, trains, adapted = self.hf.config, self.trainable_parts(), self.lora is not None
        seen, text, num_sparse = 0.0, text_config(config), len(self.blocks())
        if tower(self.hf) is not None:
            seen = vision_flops(config, batch, trains, adapted=adapted)
        read = mixture_flops(text, batch, trains, num_sparse, adapted=adapted)
        return seen + read + adapter_flops(self, batch)

    @torch.no_grad()
    def after_update(self, figures: Mapping[str, Tensor], taken: Tensor) -> None:
        """Move each expert's bias by moe.bias_rate towards an even load (arXiv 2408.15664).

        figures["expert_load"] (sparse layers, E) is of all ranks and micro-steps, and the same on
        every rank, so biases are; taken () is 0 for a step that was left out.
        """
        if self.moe.bias_rate == 0:
            return
        load = figures["expert_load"]
        moves = self.moe.bias_rate * taken * (load.mean(1, keepdim=True) - load).sign()
        for block, move in zip(self.blocks(), moves, strict=True):
            assert block.gate.e_score_correction_bias is not None, "ModelConfig.check_path lets by"
            block.gate.e_score_correction_bias += move  # in place: compiled layers keep it

    def set_mlp_chunks(self, chunks: int) -> None:
        """Refused: a router's figures are those of whole rows."""
        if chunks > 1:
            raise ValueError(
                f"engine.mlp_chunks: must be 1 with experts, got {chunks}; take "
                "engine.checkpointing=full or offload for long rows"
            )

    def run_layer(
        self,
        layer: nn.Module,
        hidden_states: Tensor,
        *,
        segments: Segments | None = None,
        figures: list[RouterFigures] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if segments is None or not isinstance(getattr(layer, "mlp", None), MoEBlock):
            return super().run_layer(layer, hidden_states, **kwargs)
        given: Any = super().run_layer(layer, hidden_states, segments=segments, **kwargs)
        hidden_states, *found = given
        assert figures is not None, "segments are given for figures"
        figures.append(RouterFigures(*found))
        return hidden_states

    def _block(
        self, stock: Any, shape: MixtureShape, dtype: torch.dtype, group: ExpertGroup
    ) -> MoEBlock:
        hidden_size = text_config(self.hf.config).hidden_size
        gate = Router(shape, hidden_size, dtype=dtype, stored=self.stored)
        experts = Experts(
            shape.num_experts,
            hidden_size,
            shape.width,
            dtype=dtype,
            stored=self.stored,
            group=group,
        )
        if shape.has_shared_gate:
            shared_gate = SharedGate(hidden_size, dtype=dtype)
            return MoEBlock(gate, experts, stock.shared_expert, shared_gate)
        return MoEBlock(gate, experts, shared_experts=getattr(stock, "shared_experts", None))


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
    attended = _mix(self, self.input_layernorm(hidden_states), sequence=sequence, **kwargs)
    hidden_states = hidden_states + attended
    out, figures = self.mlp(self.post_attention_layernorm(hidden_states), segments, sequence)
    hidden_states = hidden_states + out
    return hidden_states if figures is None else (hidden_states, *figures)


def _mix(layer: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    """What mixes a layer's tokens: attention, or Gated DeltaNet, whose cache has another name."""
    if hasattr(layer, "linear_attn"):
        cache = kwargs.pop("past_key_values", None)
        for name in ("position_embeddings", "position_ids"):
            kwargs.pop(name, None)
        mixed: Tensor = layer.linear_attn(hidden_states, cache_params=cache, **kwargs)
        return mixed
    attended, _ = layer.self_attn(hidden_states=hidden_states, **kwargs)
    return attended
