"""Wan's attention between the tokens of a video, on flash-attn 4 where it runs."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triptych_kernels import attention
from triptych_kernels.dispatch import choose, is_requested


class SelfAttention:
    """A processor for diffusers' WanAttention of one sequence; its numbers are the stock one's."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """hidden_states (N, T, H), rotary_emb of two (1, T, 1, D) → (N, T, H)."""
        assert encoder_hidden_states is None and attention_mask is None and rotary_emb is not None
        q, k = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        v = attn.to_v(hidden_states)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))
        out = attend(rotate(q, *rotary_emb), rotate(k, *rotary_emb), v)
        mixed: Tensor = attn.to_out[1](attn.to_out[0](out.flatten(2)))
        return mixed


def set_self_attention(net: nn.Module) -> None:
    """Give every block of diffusers' Wan the processor above; names of parameters stay."""
    for block in net.blocks:  # type: ignore[union-attr]
        block.attn1.set_processor(SelfAttention())


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (N, T, heads, D), each two neighbours turned; the tables name every angle twice."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    c, s = cos[..., 0::2], sin[..., 1::2]
    turned = torch.stack([even * c - odd * s, even * s + odd * c], dim=-1)
    return turned.flatten(-2).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each of N sequences by itself: (N, T, heads, D) three times → (N, T, heads, D).

    Without flash-attn 4 torch's own for sequences of one length runs.
    """
    if not is_requested("attention") and choose("attention", q) != "flash4":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    count, length = q.shape[:2]
    bounds = torch.arange(count + 1, dtype=torch.int32, device=q.device) * length
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return attention(q, k, v, bounds, length, causal=False).unflatten(0, (count, length))
