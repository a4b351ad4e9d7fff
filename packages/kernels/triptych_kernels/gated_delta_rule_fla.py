"""flash-linear-attention's gated delta rule as one node whose forward runs once.

A torch.library op gives its backward nothing but its inputs and outputs: so the outputs here are
also what fla's own autograd.Function keeps. Called are that function's parts, as fla-core 0.6.0 has
them (`dispatch.FLA_KEEPS_FORWARD`).
"""

from typing import Any

import torch
from torch import Tensor

_CHUNK = 64
_Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("triptych::gated_delta_rule_fla", mutates_args=())
def gated_delta_rule_fla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor,
    initial_state: Tensor | None,
    scale: float,
    normalize_qk: bool,
) -> _Outputs:
    """-> (T, Hv, Dv), the last states (num_docs, Hv, Dk, Dv), and for the backward:

    sums of g within chunks (T, Hv), inverses of chunks (T, Hv, 64), and with normalize_qk, else
    empty: q and k of length 1 (T, H, Dk), and 1 / the lengths they had (T, H).
    """
    from fla.modules.norm.l2norm import l2norm_fwd
    from fla.ops.gated_delta_rule.chunk import chunk_gated_delta_rule_fwd

    with torch.cuda.device_of(q):
        q, k, v, g, beta = (x.contiguous().unsqueeze(0) for x in (q, k, v, g, beta))
        lengths = [x.new_empty(1, 0) for x in (q, k, q, k)]
        if normalize_qk:
            (q, q_length), (k, k_length) = l2norm_fwd(q), l2norm_fwd(k)
            lengths = [q, k, q_length, k_length]
        sums, out, inverses, state, *_ = chunk_gated_delta_rule_fwd(
            q=q,
            k=k,
            v=v,
            g=g,
            beta=beta,
            scale=scale,
            initial_state=None if initial_state is None else initial_state.contiguous(),
            output_final_state=True,
            **_chunks(cu_seqlens),
        )
    kept = (x.squeeze(0) for x in (sums, inverses, *lengths))
    return (out.squeeze(0).to(q.dtype), state, *kept)


@gated_delta_rule_fla.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor,
    initial_state: Tensor | None,
    scale: float,
    normalize_qk: bool,
) -> _Outputs:
    state = (cu_seqlens.shape[0] - 1, v.shape[1], q.shape[2], v.shape[2])
    shapes = [q.shape, k.shape, q.shape[:2], k.shape[:2]] if normalize_qk else [(0,)] * 4
    return (
        q.new_empty(v.shape),
        q.new_empty(state, dtype=torch.float32),
        g.new_empty(g.shape, dtype=torch.float32),
        k.new_empty(*g.shape, _CHUNK),
        q.new_empty(shapes[0]),
        k.new_empty(shapes[1]),
        q.new_empty(shapes[2], dtype=torch.float32 if normalize_qk else q.dtype),
        k.new_empty(shapes[3], dtype=torch.float32 if normalize_qk else k.dtype),
    )


@torch.library.custom_op("triptych::gated_delta_rule_fla_backward", mutates_args=())
def _backward(
    d_out: Tensor,
    d_state: Tensor,
    tensors: list[Tensor],
    sums: Tensor,
    inverses: Tensor,
    lengths: list[Tensor],
    cu_seqlens: Tensor,
    scale: float,
) -> list[Tensor]:
    """-> the gradient of each of `tensors`: q, k, v, g, beta and, where given, initial_state.

    With `lengths`, of q and k, those of `tensors` are divided by them.
    """
    from fla.modules.norm.l2norm import l2norm_bwd
    from fla.ops.gated_delta_rule.chunk import chunk_gated_delta_rule_bwd

    with torch.cuda.device_of(d_out):
        q, k, v, _, beta = (x.contiguous().unsqueeze(0) for x in tensors[:5])
        dq, dk, dv, d_beta, dg, d_initial, *_ = chunk_gated_delta_rule_bwd(
            q=q,
            k=k,
            v=v,
            g=sums.unsqueeze(0),
            beta=beta,
            A=inverses.unsqueeze(0),
            scale=scale,
            initial_state=tensors[5].contiguous() if len(tensors) > 5 else None,
            do=d_out.contiguous().unsqueeze(0),
            dht=d_state.contiguous(),
            **_chunks(cu_seqlens),
        )
        if lengths:
            dq = l2norm_bwd(q, lengths[0].unsqueeze(0), dq)
            dk = l2norm_bwd(k, lengths[1].unsqueeze(0), dk)
    gradients = [x.squeeze(0) for x in (dq, dk, dv, dg, d_beta)]
    gradients += [] if d_initial is None else [d_initial]
    return [dx.to(x.dtype) for dx, x in zip(gradients, tensors, strict=True)]


@_backward.register_fake
def _(
    d_out: Tensor,
    d_state: Tensor,
    tensors: list[Tensor],
    sums: Tensor,
    inverses: Tensor,
    lengths: list[Tensor],
    cu_seqlens: Tensor,
    scale: float,
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in tensors]


def _chunks(cu_seqlens: Tensor) -> dict[str, Any]:
    """Read on the host once a cu_seqlens: fla remembers the last of them."""
    from fla.ops.utils.index import prepare_chunk_indices

    indices = prepare_chunk_indices(cu_seqlens, _CHUNK)
    return {"cu_seqlens": cu_seqlens, "chunk_indices": indices, "chunk_size": _CHUNK}


def _save(ctx: Any, inputs: tuple[Any, ...], output: _Outputs) -> None:
    q, k, v, g, beta, cu_seqlens, initial, scale, normalize_qk = inputs
    lengths = output[6:] if normalize_qk else ()
    if normalize_qk:
        q, k = output[4:6]
    ctx.save_for_backward(q, k, v, g, beta, initial, cu_seqlens, *output[2:4], *lengths)
    ctx.scale = scale
    ctx.mark_non_differentiable(*output[2:])


def _differentiate(ctx: Any, d_out: Tensor, d_state: Tensor, *rest: Tensor) -> tuple[Any, ...]:
    *tensors, cu_seqlens, sums, inverses = ctx.saved_tensors[:9]
    given, lengths = [x for x in tensors if x is not None], list(ctx.saved_tensors[9:])
    gradients = _backward(d_out, d_state, given, sums, inverses, lengths, cu_seqlens, ctx.scale)
    d_initial = gradients[5] if len(gradients) > 5 else None
    return (*gradients[:5], None, d_initial, None, None)


gated_delta_rule_fla.register_autograd(_differentiate, setup_context=_save)
