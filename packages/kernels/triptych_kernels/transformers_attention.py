"""`attention` behind transformers' own switch, `attn_implementation=`; transformers is optional."""

import importlib.util
from typing import Any

from torch import Tensor, nn

from .attention import attention


def register_attention(name: str = "triptych") -> None:
    """Make `attn_implementation=name` run transformers' models on `attention`; repeatable.

    The models then take packed rows alone: one row, without an attention_mask, with the keyword
    arguments `cu_seq_lens_q` and `max_length_q` of transformers' FlashAttention integration (as
    its `DataCollatorWithFlattening(return_flash_attn_kwargs=True)` makes them).

    Raises ImportError when transformers is not installed.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ImportError(
            "register_attention: the package transformers must be installed, got none; "
            "pip install transformers, or call triptych_kernels.attention itself"
        )
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flash_attention_mask

    AttentionInterface.register(name, attend_packed)
    # It makes no (T, T) mask, and hands a mask that hides something on, to be refused below.
    AttentionMaskInterface.register(name, flash_attention_mask)


def attend_packed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | Tensor | None = None,
    max_length_k: int | Tensor | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query (1, Hq, T, D), key and value (1, Hkv, Tk, D) -> (1, T, Hq, D)."""
    if cu_seq_lens_q is None or max_length_q is None:
        raise ValueError(
            "triptych attention: cu_seq_lens_q and max_length_q must be given, got none; pack the "
            "batch (DataCollatorWithFlattening(return_flash_attn_kwargs=True)) and pass them to "
            "the model, or choose attn_implementation='sdpa' for padded rows and for generation"
        )
    if query.shape[0] != 1 or attention_mask is not None:
        mask = None if attention_mask is None else tuple(attention_mask.shape)
        raise ValueError(
            f"triptych attention: packed documents must be one row without an attention_mask, got "
            f"{query.shape[0]} rows and a mask of shape {mask}; flatten the batch"
        )
    if dropout or s_aux is not None:
        raise ValueError(
            f"triptych attention: there must be no dropout and no attention sinks, got dropout "
            f"{dropout} and {'sinks' if s_aux is not None else 'none'}; set the model's "
            f"attention_dropout to 0, or choose another attn_implementation"
        )
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, H, D), no copy
    crosses = cu_seq_lens_k is not None and cu_seq_lens_k is not cu_seq_lens_q
    out = attention(
        q,
        k,
        v,
        cu_seq_lens_q.int(),
        _bound(max_length_q, q),
        causal=bool(module.is_causal if is_causal is None else is_causal),
        scale=scaling,
        window=sliding_window,
        softcap=softcap,
        cu_seqlens_k=cu_seq_lens_k.int() if crosses and cu_seq_lens_k is not None else None,
        max_seqlen_k=_bound(max_length_k, k) if crosses else None,
    )
    return out[None], None


def _bound(max_length: int | Tensor | None, x: Tensor) -> int:
    """A tensor is not read, which would wait for the device: all of the row is a bound as well."""
    return max_length if isinstance(max_length, int) else x.shape[0]
