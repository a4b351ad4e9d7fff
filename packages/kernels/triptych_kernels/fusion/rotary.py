"""Rotary embedding in attention modules whose forward calls it as a function of their file.

transformers calls `apply_rotary_pos_emb(q, k, cos, sin)`, a global of the modelling file. The
instance gets a forward of the same code, in which that name alone means `apply_rope`; neither the
file nor the class changes. The function is known by its name and by what it computes.
"""

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from ..rope import apply_rope, apply_rope_ref
from .probe import ERRORS, Match, agree, marked, random

_PREFIX = "apply_rotary_pos_emb"


def is_candidate(module: nn.Module) -> bool:
    return _rotary_name(type(module).forward) is not None


def recognise(module: nn.Module) -> Match | str:
    forward = type(module).forward
    assert isinstance(forward, FunctionType)
    name = _rotary_name(forward)
    assert name is not None
    rope = _kind_of(forward.__globals__[name])
    if rope is None:
        return f"{name} of its file does not turn halves of a head, as rope does"
    return Match("rope", _forward(forward, name, rope))


def _rotary_name(forward: Any) -> str | None:
    """The global that the forward calls to turn q and k; of several, none."""
    if not isinstance(forward, FunctionType) or forward.__closure__:
        return None
    found = [n for n in forward.__code__.co_names if n.startswith(_PREFIX)]
    known = [n for n in found if callable(forward.__globals__.get(n))]
    return known[0] if len(found) == len(known) == 1 else None


@cache
def _forward(forward: FunctionType, name: str, rope: Callable[..., Any]) -> Callable[..., Any]:
    # Without __name__, by which torch.compile would look globals up in the file itself.
    names = {k: v for k, v in forward.__globals__.items() if k != "__name__"}
    names[name] = rope
    copied = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__)
    copied.__kwdefaults__ = forward.__kwdefaults__
    copied.__dict__.update(forward.__dict__)
    copied.__qualname__, copied.__module__ = forward.__qualname__, forward.__module__
    copied.__annotations__ = forward.__annotations__
    return marked(copied, "rope")


@cache
def _kind_of(function: Callable[..., Any]) -> Callable[..., Any] | None:
    """Which of the two below a file's function is, by its values; None if neither."""
    for rope, lead in ((_rope_of_batches, (2, 3, 5)), (_rope_of_rows, (5, 3))):
        try:
            if all(_computes(function, rope, lead, width) for width in (16, 8)):
                return rope
            if _computes(function, rope, lead, 16):  # it cannot leave a part of a head as it is
                return rope
        except ERRORS:
            continue
    return None


def _computes(
    function: Callable[..., Any], rope: Callable[..., Any], lead: tuple[int, ...], width: int
) -> bool:
    """Compared in float32 alone: the roundings of half precision differ by design."""
    q, k = random(0, *lead, 16), random(1, *lead, 16)
    batch, tokens = (lead[0], lead[-1]) if len(lead) == 3 else (None, lead[0])
    half = random(2, *([] if batch is None else [batch]), tokens, width // 2)
    cos, sin = (torch.cat([x, x], -1) for x in (half.cos(), half.sin()))
    try:
        got = function(q, k, cos, sin)
    except ERRORS:
        return False
    return all(agree(g, w) for g, w in zip(got, rope(q, k, cos, sin, plain=True), strict=True))


def _rope_of_batches(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1, plain: bool = False
) -> tuple[Tensor, Tensor]:
    """q (B, Hq, T, D), k (B, Hk, T, D), heads after tokens for unsqueeze_dim 2; cos (B, T, R)."""
    if unsqueeze_dim == 1:
        q, k = q.transpose(1, 2), k.transpose(1, 2)  # (B, T, H, D), no copy
    batch, tokens = q.shape[:2]
    cos, sin = (x.expand(batch, *x.shape[1:]).flatten(0, 1) for x in (cos, sin))  # (B T, R)
    op = apply_rope_ref if plain else apply_rope
    turned = op(q.flatten(0, 1), k.flatten(0, 1), cos, sin, rotary_dim=cos.shape[-1])
    q, k = (x.unflatten(0, (batch, tokens)) for x in turned)
    return (q.transpose(1, 2), k.transpose(1, 2)) if unsqueeze_dim == 1 else (q, k)


def _rope_of_rows(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, plain: bool = False
) -> tuple[Tensor, Tensor]:
    """Vision towers: q, k (T, H, D); cos, sin (T, D)."""
    op = apply_rope_ref if plain else apply_rope
    return op(q, k, cos, sin, rotary_dim=cos.shape[-1])
