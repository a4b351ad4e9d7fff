"""The FlashAttention backends of `attention`: FA4, torch's varlen (FA2), the flash-attn package.

FlashAttention-2: Dao, arXiv 2307.08691; FlashAttention-4: Dao-AILab/flash-attention,
flash_attn/cute. All of them align the last query of a document with its last key.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention_pattern import Pattern
from .dispatch import FLASH4_WIDTHS, is_traced

# torch 2.12 added the flag and checks it; 2.11 takes fewer key heads without being told.
_HAS_GQA_FLAG = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 12)


def varlen(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """q (Tq, Hq, D), k and v (Tk, Hkv, D) -> out (Tq, Hq, D), lse (Hq, Tq) when it is wanted."""
    # Here and not above: the module brings torch._dynamo along, a second of importing.
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    sides = pattern.sides()
    if return_lse and sides == (-1, -1):
        # Without a window cuDNN may run (torch 2.14), whose lse is laid out differently.
        sides = (pattern.max_seqlen_q + pattern.max_seqlen_k,) * 2
    options: dict[str, Any] = {}
    if _HAS_GQA_FLAG and q.shape[1] != k.shape[1]:
        options["enable_gqa"] = True
    result: Any = varlen_attn(
        q,
        k,
        v,
        pattern.cu_seqlens_q,
        pattern.cu_seqlens_k,
        pattern.max_seqlen_q,
        pattern.max_seqlen_k,
        scale=pattern.scale,
        window_size=sides,
        return_aux=AuxRequest(lse=return_lse),
        **options,
    )
    return (result[0], _without_keys(result[1])) if return_lse else (result, None)


def flash2(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """As `varlen`, on the package flash-attn."""
    from flash_attn.flash_attn_interface import flash_attn_varlen_func  # type: ignore[import-not-found]

    options: dict[str, Any] = {} if pattern.softcap is None else {"softcap": pattern.softcap}
    result = flash_attn_varlen_func(
        q,
        k,
        v,
        pattern.cu_seqlens_q,
        pattern.cu_seqlens_k,
        pattern.max_seqlen_q,
        pattern.max_seqlen_k,
        softmax_scale=pattern.scale,
        causal=pattern.causal,
        window_size=pattern.sides(),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        return_attn_probs=return_lse,  # which, without dropout, are None
        **options,
    )
    return (result[0], _without_keys(result[1])) if return_lse else (result, None)


def flash4(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """As `varlen`, on the package flash-attn-4; its first call of a kind compiles for seconds.

    Heads of a width that it has no kernel for are widened by zeros, which add nothing to a score.
    """
    width = q.shape[-1]
    wide = next(each for each in FLASH4_WIDTHS if each >= width)
    if wide != width:
        pattern = pattern._replace(scale=width**-0.5 if pattern.scale is None else pattern.scale)
        q, k, v = (F.pad(x, (0, wide - width)) for x in (q, k, v))
    out, lse = _run_flash4(q, k, v, pattern, return_lse)
    return out[..., :width], lse


def _run_flash4(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    if is_traced(q):
        return _flash4(q, k, v, *pattern)
    return _flash4_forward(q, k, v, pattern, return_lse)


def _without_keys(lse: Tensor) -> Tensor:
    """FA2 says +inf for a query that sees no key, where the sum of no exponentials is 0."""
    return lse.detach().masked_fill(lse == torch.inf, -torch.inf)


def _flash4_forward(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    from flash_attn.cute.interface import flash_attn_varlen_func  # type: ignore[import-not-found]

    out, lse = flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=pattern.cu_seqlens_q,
        cu_seqlens_k=pattern.cu_seqlens_k,
        max_seqlen_q=pattern.max_seqlen_q,
        max_seqlen_k=pattern.max_seqlen_k,
        softmax_scale=pattern.scale,
        causal=pattern.causal,
        window_size=_flash4_sides(pattern),
        softcap=pattern.softcap or 0.0,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        return_lse=return_lse,
    )
    return out, lse


def _flash4_sides(pattern: Pattern) -> tuple[int | None, int | None]:
    left, right = (None if side < 0 else side for side in pattern.sides())
    return left, right


@torch.library.custom_op("triptych::flash4", mutates_args=())
def _flash4(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """-> out (Tq, Hq, D), lse (Hq, Tq) float32."""
    pattern = Pattern(
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, scale, window, softcap
    )
    with torch.no_grad():  # the package's own autograd.Function stays out of it
        out, lse = _flash4_forward(q, k, v, pattern, return_lse=True)
    assert lse is not None
    return out, lse


@_flash4.register_fake
def _(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@torch.library.custom_op("triptych::flash4_backward", mutates_args=())
def _flash4_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dq (Tq, Hq, D), dk and dv (Tk, Hkv, D): summed over the queries that share a key head."""
    from flash_attn.cute.interface import _flash_attn_bwd

    pattern = Pattern(
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, scale, window, softcap
    )
    left, right = _flash4_sides(pattern)
    # Ours, because the layout of its own depends on the layout of q, k and v.
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    _flash_attn_bwd(
        q,
        k,
        v,
        out,
        dout.contiguous(),
        lse,
        softmax_scale=scale,
        causal=causal,
        softcap=softcap or 0.0,
        window_size_left=left,
        window_size_right=right,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        dq=dq,
        dk=dk,
        dv=dv,
    )
    return dq, dk, dv


@_flash4_backward.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens_q, cu_seqlens_k)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, dout: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _flash4_backward(dout, *ctx.saved_tensors, *ctx.settings)
    return (*gradients, *[None] * (len(ctx.settings) + 2))


_flash4.register_autograd(_differentiate, setup_context=_save)
