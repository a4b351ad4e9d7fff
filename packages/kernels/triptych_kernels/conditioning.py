"""How modulate and gate_add spread their conditioning over the tokens.

Tokens come in groups that share one row of conditioning: a sample of a batch, a document of a
packed row, or each token alone.
"""

from torch import Tensor

from .documents import check_cu_seqlens, document_of


def as_groups(
    op: str, what: str, condition: Tensor, x: Tensor, cu_seqlens: Tensor | None
) -> Tensor:
    """-> `condition` as (groups, H), the rows in the order of the tokens of x (..., H).

    Without cu_seqlens x is (B, ..., H) and the condition (B, H) or (B, 1, ..., H), one per sample,
    or has the shape of x, one per token. With cu_seqlens (B + 1,), x is (T, H) and the condition
    (B, H). Raises ValueError otherwise.
    """
    if cu_seqlens is not None:
        check_cu_seqlens(op, cu_seqlens, x.shape[0])
        fits = x.ndim == 2 and condition.shape == (cu_seqlens.shape[0] - 1, x.shape[-1])
    elif condition.shape == x.shape:
        fits = True
    elif x.ndim < 2:
        fits = False
    else:
        per_sample = (x.shape[0], *[1] * (x.ndim - 2), x.shape[-1])
        fits = condition.shape in (per_sample, per_sample[:: len(per_sample) - 1])
    if not fits:
        raise ValueError(
            f"{op}: {what} must hold one row per sample, document or token of x "
            f"{tuple(x.shape)}, got {tuple(condition.shape)}; give (B, H) for x (B, ..., H), x's "
            f"own shape, or (B, H) with cu_seqlens (B + 1,) for x (T, H)"
        )
    return condition.reshape(condition.shape.numel() // max(x.shape[-1], 1), x.shape[-1])


def spread(condition: Tensor, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """(groups, H) -> the row of each token, broadcastable over x viewed as (..., H)."""
    if cu_seqlens is not None:
        return condition[document_of(cu_seqlens, x.shape[0])]
    if condition.numel() == x.numel():
        return condition.view(x.shape)
    return condition.view(x.shape[0], *[1] * (x.ndim - 2), x.shape[-1])
