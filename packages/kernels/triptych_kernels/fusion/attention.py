"""Attention of models of transformers, through their own switch, the AttentionInterface.

Configurations that say "sdpa" are set to an implementation that takes packed rows (cu_seq_lens_q)
and rows without padding to `attention`. Padded rows and generation with a cache stay with sdpa, as
do calls for which `attention` itself would run sdpa or its reference.
"""

import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import attention
from ..autocast import lowered
from ..dispatch import choose, is_requested
from ..transformers_attention import attend_packed

NAME = "triptych_fused"
OP = "attention"
_MARK = "_triptych_attention"


class _Registration:
    """In a fused model; makes its pickle register NAME where it is loaded."""

    def __init__(self) -> None:
        _register()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Registration, ()


def configurations(model: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    """(name, the outermost module that has it, configuration) of each one that names attention."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        if hasattr(module, "set_attn_implementation") and id(config) not in seen:
            seen.add(id(config))
            yield f"{name}.config" if name else "config", module, config


def why_not(module: nn.Module, config: Any) -> str:
    """Why the attention under this configuration is left as it is; "" when it need not be."""
    if config._attn_implementation == NAME:
        return "it is fused already"
    if config._attn_implementation != "sdpa":
        return f"its attention must be sdpa, is {config._attn_implementation}"
    if not module._can_set_attn_implementation():  # type: ignore[operator]
        return "its code does not call the AttentionInterface"
    return ""


def switch(model: nn.Module, config: Any) -> None:
    setattr(model, _MARK, _Registration())
    config._attn_implementation = {"": NAME}


def unswitch(model: nn.Module) -> list[str]:
    """Back to sdpa; returns the names of the configurations."""
    if importlib.util.find_spec("transformers") is None:
        return []
    names = []
    for name, _, config in configurations(model):
        if config._attn_implementation == NAME:
            config._attn_implementation = {"": "sdpa"}
            names.append(name)
    for module in model.modules():
        module.__dict__.pop(_MARK, None)
    return names


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """query (B, Hq, T, D), key and value (B, Hkv, Tk, D) -> (B, T, Hq, D)."""
    query, key, value = lowered(query), lowered(key), lowered(value)
    if kwargs.get("cu_seq_lens_q") is not None and query.shape[0] == 1:
        # The mask that came along is the same documents once more, made from position_ids.
        return attend_packed(module, query, key, value, None, **kwargs)
    if attention_mask is None and _takes(module, query, key, value, kwargs):
        return _attend_full_rows(module, query, key, value, **kwargs), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _takes(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]
) -> bool:
    if choose("attention", query) in ("sdpa", "reference") and not is_requested("attention"):
        return False  # nothing faster can run here than what the model has
    windowed = kwargs.get("sliding_window") is not None and not _is_causal(module, kwargs)
    beyond = ("s_aux", "position_bias", "cache", "dropout")
    return (
        query.shape[2] == key.shape[2] > 1
        and query.shape[3] == value.shape[3]
        and not windowed
        and not any(kwargs.get(name) is not None and kwargs[name] != 0 for name in beyond)
    )


def _is_causal(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    given = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if given is None else given)


def _attend_full_rows(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> Tensor:
    """Every row of the batch as one document of a packed row."""
    rows, _, length, _ = query.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # (B T, H, D)
    bounds = torch.arange(
        0, (rows + 1) * length, length, dtype=torch.int32, device=query.device
    )  # (B + 1,)
    out = attention(
        q,
        k,
        v,
        bounds,
        length,
        causal=_is_causal(module, kwargs),
        scale=scaling,
        window=sliding_window,
        softcap=softcap,
    )
    return out.unflatten(0, (rows, length))
