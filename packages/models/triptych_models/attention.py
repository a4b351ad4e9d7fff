"""Packed attention behind transformers' own switch: `AttentionInterface`."""

from typing import Any

from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedModel,
    Qwen3VLForConditionalGeneration,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    Qwen3VLVisionAttention,
    apply_rotary_pos_emb_vision,
)

from triptych_kernels import attention

from .layout import ear
from .sequence import ALONE, SequenceGroup, heads_to_tokens, tokens_to_heads

PACKED = "triptych_packed"


def register() -> None:
    """Make `attn_implementation="triptych_packed"` known to transformers; harmless if repeated."""
    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, sdpa_mask)


def pack_vision_attention(model: Qwen3VLForConditionalGeneration) -> None:
    """Give every block of the vision tower packed attention; names of parameters stay."""
    for block in model.model.visual.blocks:
        is_split = not hasattr(block.attn, "qkv")
        packed = SplitVisionAttention if is_split else PackedVisionAttention
        block.attn = packed(block.attn)


def pack_audio_attention(model: PreTrainedModel) -> None:
    """The same for every layer of the audio tower."""
    for layer in ear(model).layers:
        layer.self_attn = PackedAudioAttention(layer.self_attn)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    sequence: SequenceGroup = ALONE,
    causal: bool = True,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention inside each document of one packed row, causal unless it looks both ways.

    query (1, Hq, T, D), key and value (1, Hkv, T, D), cu_seqlens (num_docs + 1,) int32
    → (1, T, Hq, D). In a sequence group of N ranks each has T/N of the row's T tokens.
    Without cu_seqlens the rows are ordinary padded ones (generation with a cache) and
    transformers' sdpa answers, with the mask it made.
    """
    if cu_seqlens is None or max_seqlen is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    assert query.shape[0] == 1 and attention_mask is None, "packed rows are one row without a mask"
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, H, D), no copy
    if sequence.size > 1:
        q, k, v = tokens_to_heads(q, k, v, sequence)
    out = attention(q, k, v, cu_seqlens, max_seqlen, causal=causal, scale=scaling)
    if sequence.size > 1:
        out = heads_to_tokens(out, sequence)
    return out[None], None


class PackedVisionAttention(nn.Module):
    """Stands in for Qwen3VLVisionAttention and owns its projections, so names in checkpoints stay.

    The stock module reads the frame lengths back to the host (a device sync per block) unless a
    flash-attn package is installed; this one takes them packed.
    """

    def __init__(self, stock: Qwen3VLVisionAttention) -> None:
        super().__init__()
        self.take(stock)
        self.proj = stock.proj
        self.num_heads = stock.num_heads

    def take(self, stock: Any) -> None:
        """Own the stock module's projections of queries, keys and values."""
        self.qkv = stock.qkv

    def project(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        """hidden_states (P, hidden) to queries, keys and values (P, H, D)."""
        return self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).unbind(1)

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        max_seqlen: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """hidden_states (P, hidden), cu_seqlens (num_frames + 1,) int32 → (P, hidden)."""
        if max_seqlen is None:  # the stock tower (in generation) does not say it
            max_seqlen = int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
        q, k, v = self.project(hidden_states)
        q, k = apply_rotary_pos_emb_vision(q, k, *position_embeddings)  # (P, H, D)
        return self.proj(attention(q, k, v, cu_seqlens, max_seqlen, causal=False).flatten(1))


class SplitVisionAttention(PackedVisionAttention):
    """The same of a tower whose queries, keys and values are apart: Qwen2.5-Omni's."""

    def take(self, stock: Any) -> None:
        """Own the stock module's projections of queries, keys and values."""
        self.q, self.k, self.v = stock.q, stock.k, stock.v

    def project(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        """hidden_states (P, hidden) to queries, keys and values (P, H, D)."""
        shape = (self.num_heads, -1)
        return tuple(x(hidden_states).unflatten(-1, shape) for x in (self.q, self.k, self.v))


class PackedAudioAttention(nn.Module):
    """Stands in for the attention of Qwen's audio towers, as PackedVisionAttention does."""

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.k_proj, self.v_proj, self.q_proj = stock.k_proj, stock.v_proj, stock.q_proj
        self.out_proj = stock.out_proj
        self.num_heads = stock.num_heads

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """hidden_states (K, hidden), cu_seqlens (windows + 1,) int32 → (K, hidden)."""
        if max_seqlen is None:  # the stock tower (in generation) does not say it
            max_seqlen = int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
        q, k, v = (
            projection(hidden_states).unflatten(-1, (self.num_heads, -1))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # (K, H, D)
        return self.out_proj(attention(q, k, v, cu_seqlens, max_seqlen, causal=False).flatten(1))
