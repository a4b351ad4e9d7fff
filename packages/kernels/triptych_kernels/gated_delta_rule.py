"""Gated delta rule, the recurrence of Gated DeltaNet (arXiv 2412.06464, equation 10).

    S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,    o_t = scale S_t^T q_t

with alpha_t = exp(g_t) and a state S of (Dk, Dv) per head: old content fades by alpha, and what S
holds under the key k is replaced by v at the rate beta. The fla backend is flash-linear-attention's
Triton kernels; "chunked" is the same in matrix products over 64 tokens (the paper's section 3.3).
"""

from typing import Any

import torch
from torch import Tensor

from .dispatch import FLA_KEEPS_FORWARD, choose, is_traced
from .documents import check_cu_seqlens, document_of, position_of
from .gated_delta_rule_fla import gated_delta_rule_fla
from .recompute import recomputed_gradients

_CHUNK = 64
# exp of it is 0. Larger decays would only take digits from the sums of g over a chunk.
_FORGOTTEN = {torch.float32: -128.0, torch.float64: -768.0}


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    normalize_qk: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the gated delta rule over each document of a packed row; no state crosses documents.

    q, k: (T, H, Dk); v: (T, Hv, Dv) with Hv a multiple of H (value head i reads q and k of head
    i // (Hv / H)); g: (T, Hv), the logarithm of the decay, at most 0; beta: (T, Hv); cu_seqlens:
    (num_docs + 1,) int32 from 0 to T, documents of length 0 allowed. scale: 1/sqrt(Dk) by default.
    initial_state: (num_docs, Hv, Dk, Dv), zeros by default. normalize_qk: give each q and k length
    1 first, x / sqrt(sum x^2 + 1e-6), as Qwen3-Next does.

    Returns (T, Hv, Dv) in q's dtype, and with return_state also the last state of each document,
    (num_docs, Hv, Dk, Dv) float32. The arithmetic is float32 (float64 for float64 q). chunked
    reads nothing on the host; fla reads a cu_seqlens tensor on the host the first time it sees it
    (the layers of a step share that read when they share the tensor). Under torch.compile the op is
    one node on every backend and runs its forward a second time in the backward, but for fla 0.6.0,
    whose parts are known. Raises ValueError for shapes that do not fit.
    """
    _check_shapes(q, k, v, g, beta, initial_state, cu_seqlens)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    name = choose("gated_delta_rule", q, backend)
    given = (q, k, v, g, beta, cu_seqlens, initial_state, scale, normalize_qk)
    if not is_traced(q):
        out, state = _run(*given, name)
    elif name == "fla" and FLA_KEEPS_FORWARD:
        out, state, *_ = gated_delta_rule_fla(*given)
    else:
        out, state = _gated_delta_rule(*given, name)
    return (out, state) if return_state else out


def gated_delta_rule_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    normalize_qk: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`gated_delta_rule` token by token, the formula as it is written; for tests and reading."""
    return gated_delta_rule(
        q,
        k,
        v,
        g,
        beta,
        cu_seqlens,
        scale=scale,
        initial_state=initial_state,
        return_state=return_state,
        normalize_qk=normalize_qk,
        backend="reference",
    )


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor,
    initial_state: Tensor | None,
    scale: float,
    normalize_qk: bool,
    name: str,
) -> tuple[Tensor, Tensor]:
    """-> (T, Hv, Dv), (num_docs, Hv, Dk, Dv) on the backend of that name."""
    if name == "fla":
        return _call_fla(q, k, v, g, beta, cu_seqlens, initial_state, scale, normalize_qk)
    wide = torch.promote_types(q.dtype, torch.float32)
    q_, k_, v_, g_, beta_ = (x.to(wide) for x in (q, k, v, g, beta))
    if normalize_qk:
        q_, k_ = _normalize(q_), _normalize(k_)
    state = _first_states(q_, v_, cu_seqlens, initial_state)
    steps = _recurrent if name == "reference" else _chunked
    with torch.autocast(q.device.type, enabled=False):
        out, state = steps(q_ * scale, k_, v_, g_, beta_, cu_seqlens, state)
    return out.to(q.dtype), state


def _normalize(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def _first_states(q: Tensor, v: Tensor, cu_seqlens: Tensor, given: Tensor | None) -> Tensor:
    """-> (num_docs, Hv, Dk, Dv) in the dtype of the arithmetic."""
    if given is not None:
        return given.to(q.dtype)
    return q.new_zeros(cu_seqlens.shape[0] - 1, v.shape[1], q.shape[2], v.shape[2])


def _recurrent(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Tensor, states: Tensor
) -> tuple[Tensor, Tensor]:
    """The plain loop. Everything in one wide dtype, q already scaled -> (T, Hv, Dv), states."""
    group = v.shape[1] // q.shape[1]
    q, k = (x.repeat_interleave(group, 1) for x in (q, k))  # (T, Hv, Dk)
    lengths = cu_seqlens.diff().tolist()
    out, last = [], []
    documents = zip(*(x.split(lengths) for x in (q, k, v, g, beta)), states, strict=True)
    for q_doc, k_doc, v_doc, g_doc, beta_doc, first in documents:
        state = first  # (Hv, Dk, Dv)
        for q_t, k_t, v_t, g_t, beta_t in zip(q_doc, k_doc, v_doc, g_doc, beta_doc, strict=True):
            # S' = alpha S
            state = g_t.exp()[:, None, None] * state
            # what S' holds under the key: S'^T k
            held = torch.einsum("hkv,hk->hv", state, k_t)
            # S = S' + beta k (v - S'^T k)^T = alpha (I - beta k k^T) S_{t-1} + beta k v^T
            change = beta_t[:, None] * (v_t - held)
            state = state + torch.einsum("hk,hv->hkv", k_t, change)
            # o = S^T q, with the scale already in q
            out.append(torch.einsum("hkv,hk->hv", state, q_t))
        last.append(state)
    return torch.stack(out) if out else v, torch.stack(last)


def _chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Tensor, states: Tensor
) -> tuple[Tensor, Tensor]:
    """The same in chunks of 64 tokens, of which each lies in one document.

    With c_i = g_1 + ... + g_i within the chunk and S the state before it, the change at token i is

        u_i = beta_i (v_i - e^{c_i} S^T k_i - sum_{j<i} e^{c_i - c_j} (k_i . k_j) u_j)

    or (I + A) U = diag(beta) (V - diag(e^c) K S), with A_ij = beta_i e^{c_i - c_j} (k_i . k_j)
    below the diagonal and 0 elsewhere.
    """
    group = v.shape[1] // q.shape[1]
    slots, document, is_first, last = _chunks(cu_seqlens, q.shape[0])
    n = document.shape[0]

    def lay(x: Tensor, group: int = 1) -> Tensor:
        """(T, heads, ...) -> (n, Hv, 64, ...), zeros in the slots without a token."""
        laid = x.new_zeros(n * _CHUNK, *x.shape[1:]).index_copy(0, slots, x)
        return laid.unflatten(0, (n, _CHUNK)).transpose(1, 2).repeat_interleave(group, 1)

    q, k, v, g, beta = lay(q, group), lay(k, group), lay(v), lay(g), lay(beta).unsqueeze(-1)
    c = g.clamp(min=_FORGOTTEN[g.dtype]).cumsum(-1)  # (n, Hv, 64)
    above = torch.ones(_CHUNK, _CHUNK, dtype=torch.bool, device=q.device).triu(1)
    # Masked before exp: above the diagonal c_i - c_j is positive and could overflow.
    fade = (c.unsqueeze(-1) - c.unsqueeze(-2)).masked_fill(above, -torch.inf).exp()
    a = beta * (k @ k.mT) * fade  # only what lies below the diagonal is read
    scores = (q @ k.mT) * fade
    right = torch.cat([beta * v, beta * k * c.exp().unsqueeze(-1)], dim=-1)
    solved = torch.linalg.solve_triangular(a, right, upper=False, unitriangular=True)
    values, keys = solved.split([v.shape[-1], k.shape[-1]], dim=-1)  # U = values - keys @ S
    q_faded = q * c.exp().unsqueeze(-1)
    k_faded = k * (c[..., -1:] - c).exp().unsqueeze(-1)
    chunk_fade = c[..., -1].exp()[..., None, None]

    state, out, after = states.new_zeros(states.shape[1:]), [], []
    for i in range(n):
        state = torch.where(is_first[i], states.index_select(0, document[i : i + 1])[0], state)
        u = values[i] - keys[i] @ state
        out.append(q_faded[i] @ state + scores[i] @ u)
        state = chunk_fade[i] * state + k_faded[i].mT @ u
        after.append(state)
    tokens = torch.stack(out).transpose(1, 2).flatten(0, 1).index_select(0, slots)
    empty = cu_seqlens.diff() == 0
    return tokens, torch.where(empty[:, None, None, None], states, torch.stack(after)[last])


def _chunks(cu_seqlens: Tensor, num_tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lay documents out in n = T // 64 + num_docs chunks, a bound that needs no host read.

    -> slots (T,), the place of each token in (n * 64,); per chunk its document (n,) and whether it
    is that document's first (n,); per document its last chunk (num_docs,). Chunks left over at the
    end hold no token and change nothing.
    """
    chunks = cu_seqlens.diff().add(_CHUNK - 1).div(_CHUNK, rounding_mode="floor").long()
    starts = torch.nn.functional.pad(chunks.cumsum(0), (1, 0))  # (num_docs + 1,)
    document = document_of(cu_seqlens, num_tokens)
    slots = starts[document] * _CHUNK + position_of(cu_seqlens, num_tokens)
    number = torch.arange(num_tokens // _CHUNK + chunks.shape[0], device=cu_seqlens.device)
    owner = (torch.searchsorted(starts, number, right=True) - 1).clamp(max=chunks.shape[0] - 1)
    is_first = (number == starts[owner]) & (number < starts[-1])
    return slots, owner, is_first, (starts[1:] - 1).clamp(min=0)


def _check_shapes(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial: Tensor | None, bounds: Tensor
) -> None:
    fits = (
        q.dim() == v.dim() == 3
        and q.shape == k.shape
        and q.shape[0] == v.shape[0]
        and v.shape[1] % q.shape[1] == 0
        and g.shape == beta.shape == v.shape[:2]
    )
    if not fits:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v, g, beta))
        raise ValueError(
            f"gated_delta_rule: q and k must be (T, H, Dk), v (T, Hv, Dv) with Hv a multiple of H, "
            f"g and beta (T, Hv), got {shapes}; reshape them"
        )
    check_cu_seqlens("gated_delta_rule", bounds, q.shape[0])
    wanted = (bounds.shape[0] - 1, v.shape[1], q.shape[2], v.shape[2])
    if initial is not None and initial.shape != wanted:
        raise ValueError(
            f"gated_delta_rule: initial_state must be (num_docs, Hv, Dk, Dv) = {wanted}, got "
            f"{tuple(initial.shape)}; give one state a document"
        )


def _call_fla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor,
    initial_state: Tensor | None,
    scale: float,
    normalize_qk: bool,
) -> tuple[Tensor, Tensor]:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    out, state = chunk_gated_delta_rule(
        *(x.unsqueeze(0) for x in (q, k, v, g, beta)),
        scale=scale,
        initial_state=initial_state,
        output_final_state=True,
        use_qk_l2norm_in_kernel=normalize_qk,
        cu_seqlens=cu_seqlens,
    )
    return out.squeeze(0), state


@torch.library.custom_op("triptych::gated_delta_rule", mutates_args=())
def _gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor,
    initial_state: Tensor | None,
    scale: float,
    normalize_qk: bool,
    name: str,
) -> tuple[Tensor, Tensor]:
    """One node: fla's own op cannot be traced, and the chunks would be unrolled one by one."""
    out, state = _run(q, k, v, g, beta, cu_seqlens, initial_state, scale, normalize_qk, name)
    given = state is initial_state  # without a token
    return out.contiguous(), state.clone() if given else state.contiguous()


@_gated_delta_rule.register_fake
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
    name: str,
) -> tuple[Tensor, Tensor]:
    shape = (cu_seqlens.shape[0] - 1, v.shape[1], q.shape[2], v.shape[2])
    wide = torch.float32 if name == "fla" else torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(v.shape), q.new_empty(shape, dtype=wide)


@torch.library.custom_op("triptych::gated_delta_rule_backward", mutates_args=())
def _gated_delta_rule_backward(
    d_out: Tensor,
    d_state: Tensor,
    tensors: list[Tensor],
    cu_seqlens: Tensor,
    scale: float,
    normalize_qk: bool,
    name: str,
) -> list[Tensor]:
    """-> the gradient of each of `tensors`: q, k, v, g, beta and, where given, initial_state."""

    def forward(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return _run(q, k, v, g, beta, cu_seqlens, initial, scale, normalize_qk, name)

    return recomputed_gradients(forward, tensors, [d_out, d_state])


@_gated_delta_rule_backward.register_fake
def _(
    d_out: Tensor,
    d_state: Tensor,
    tensors: list[Tensor],
    cu_seqlens: Tensor,
    scale: float,
    normalize_qk: bool,
    name: str,
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in tensors]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.options = inputs[7:]


def _differentiate(ctx: Any, d_out: Tensor, d_state: Tensor) -> tuple[Any, ...]:
    *tensors, cu_seqlens, initial = ctx.saved_tensors
    given = tensors if initial is None else [*tensors, initial]
    gradients = _gated_delta_rule_backward(d_out, d_state, given, cu_seqlens, *ctx.options)
    d_initial = None if initial is None else gradients[5]
    return (*gradients[:5], None, d_initial, None, None, None)


_gated_delta_rule.register_autograd(_differentiate, setup_context=_save)
