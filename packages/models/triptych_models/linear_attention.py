"""Gated DeltaNet layers (arXiv 2412.06464) over packed rows: no state crosses documents.

Transformers' modules stay, with their names; only what they compute of a packed row is ours, by
`triptych_kernels`: a short convolution, then the gated delta rule, each within its document.
"""

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig

from triptych_kernels import causal_conv1d, gated_delta_rule

from .layout import decoder
from .packed import PackedModel
from .sequence import SequenceGroup


class LinearAttention(PackedModel):
    """Of a model whose layers are, some or all of them, Gated DeltaNet: stands before its family.

    hf_config and settings as the family's.
    """

    def __init__(self, hf_config: PretrainedConfig, **settings: Any) -> None:
        super().__init__(hf_config, **settings)
        for layer in decoder(self.hf).layers:
            if hasattr(layer, "linear_attn"):
                layer.linear_attn.forward = MethodType(run_packed, layer.linear_attn)

    def run_decoder(
        self, hidden_states: Tensor, position_ids: Tensor, *layout: Any, **settings: Any
    ) -> Tensor:
        """As `PackedModel.run_decoder`; positions of text alone stand for all three axes."""
        if hasattr(decoder(self.hf).rotary_emb, "mrope_section") and position_ids.ndim == 2:
            position_ids = position_ids.expand(3, -1, -1)  # transformers does it from 5.19 on
        return super().run_decoder(hidden_states, position_ids, *layout, **settings)

    def set_sequence(self, group: SequenceGroup) -> None:
        """Refused for more than one rank: a state goes through a document token by token."""
        if group.size > 1:
            raise ValueError(
                f"parallel.sequence: must be 1 for layers of Gated DeltaNet, got {group.size}; "
                "take engine.checkpointing=offload for long rows"
            )
        super().set_sequence(group)


def run_packed(
    self: Any,
    hidden_states: Tensor,
    cache_params: Any = None,
    attention_mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """The forward of a layer's `linear_attn`: hidden_states (1, T, H) → (1, T, H).

    cu_seqlens (num_docs + 1,) int32. Without them the rows are ordinary ones (generation with a
    cache), and stock answers.
    """
    if cu_seqlens is None:
        stock: Tensor = type(self).forward(
            self, hidden_states, cache_params, attention_mask, **kwargs
        )
        return stock
    assert hidden_states.shape[0] == 1 and attention_mask is None, "packed rows have no mask"
    mixed, z, b, a = _project(self, hidden_states)
    widths = (self.key_dim, self.key_dim, self.value_dim)
    q, k, v = causal_conv1d(  # (T, heads * D) each
        mixed, self.conv1d.weight[:, 0], cu_seqlens, silu=True, widths=widths
    )
    wide = torch.promote_types(a.dtype, torch.float32)
    decay = -self.A_log.to(wide).exp() * F.softplus(a.to(wide) + self.dt_bias)  # (T, Hv)
    out = gated_delta_rule(
        q.unflatten(-1, (self.num_k_heads, self.head_k_dim)),
        k.unflatten(-1, (self.num_k_heads, self.head_k_dim)),
        v.unflatten(-1, (self.num_v_heads, self.head_v_dim)),
        decay,
        b.sigmoid(),
        cu_seqlens,
        normalize_qk=True,
    )
    assert isinstance(out, Tensor)  # (T, Hv, Dv)
    gated = self.norm(out.flatten(0, 1), z.reshape(-1, self.head_v_dim))
    result: Tensor = self.out_proj(gated.view(1, len(out), self.value_dim))
    return result


def _project(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the convolution takes (T, 2 * key_dim + value_dim), gate z, and b and a (T, Hv)."""
    if hasattr(self, "in_proj_qkv"):  # Qwen3.5
        projections = (self.in_proj_qkv, self.in_proj_z, self.in_proj_b, self.in_proj_a)
        mixed, z, b, a = (projection(hidden_states)[0] for projection in projections)
        return mixed, z, b, a
    # Qwen3-Next, whose rows are ordered by key heads
    given = self.in_proj_qkvz(hidden_states), self.in_proj_ba(hidden_states)
    q, k, v, z, b, a = (x[0] for x in self.fix_query_key_value_ordering(*given))
    return torch.cat([x.flatten(1) for x in (q, k, v)], -1), z, b, a
