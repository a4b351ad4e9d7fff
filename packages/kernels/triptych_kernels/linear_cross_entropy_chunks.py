"""The work of `linear_cross_entropy`: losses and gradients, chunk of rows by chunk of rows."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .cross_entropy_in_place import Terms, cross_entropy_in_place


class Result(NamedTuple):
    """loss () and losses (R,) of the R rows that have a target, and their gradients."""

    loss: Tensor
    losses: Tensor
    d_hidden: Tensor | None  # (R, H)
    d_weight: Tensor | None
    d_bias: Tensor | None
    rows: Tensor  # (R,)


def compute(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    weights: Tensor | None,
    ignore_index: int,
    num_targets: int | None,
    chunk_rows: int,
    z_loss: float,
    softcap: float | None,
    label_smoothing: float,
    name: str,
    wants: Sequence[bool],
) -> Result:
    """hidden_states (N, H), weight (V, H), labels and weights (N,) -> see Result.

    `wants` says of which of hidden_states, weight and bias the gradients are computed.
    """
    _check_labels(labels, weight.shape[0], ignore_index, num_targets)
    rows = _target_rows(labels, ignore_index, num_targets)
    terms = Terms(z_loss, softcap, label_smoothing)
    wide = wide_dtype(hidden_states.dtype)
    num_chunks = max(1, -(-len(rows) // chunk_rows))
    # The sum over several chunks is kept in float32; a single product rounds only once anyway.
    d_weight_dtype = wide if num_chunks > 1 else weight.dtype
    d_hidden = hidden_states.new_empty(len(rows), weight.shape[1]) if wants[0] else None
    d_weight = torch.zeros_like(weight, dtype=d_weight_dtype) if wants[1] else None
    d_bias = weight.new_zeros(weight.shape[0], dtype=wide) if wants[2] else None
    losses = hidden_states.new_empty(len(rows), dtype=wide)
    start = 0
    # Chunks of one size: a short last one would read the whole weight for a few rows.
    for chunk in rows.split(max(1, -(-len(rows) // num_chunks))):
        x = hidden_states.index_select(0, chunk)  # (C, H)
        logits = F.linear(x, weight, bias)  # (C, V)
        here = slice(start, start + len(chunk))
        of_chunk = None if weights is None else weights[chunk].to(wide)
        losses[here] = cross_entropy_in_place(
            name, logits, labels[chunk], of_chunk, terms, any(wants)
        )
        if d_hidden is not None:
            torch.mm(logits, weight, out=d_hidden[here])
        if d_weight is not None:
            _add_product(d_weight, logits, x)
        if d_bias is not None:
            d_bias += logits.sum(0, dtype=wide)
        start += len(chunk)
        del logits  # or the next chunk's would be computed while these are still held
    d_weight = d_weight if d_weight is None else d_weight.to(weight.dtype)
    d_bias = d_bias if d_bias is None or bias is None else d_bias.to(bias.dtype)
    return Result(losses.sum(), losses, d_hidden, d_weight, d_bias, rows)


def spread(of_targets: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """(R, ...) -> (N, ...), zero in the rows without a target."""
    everywhere = of_targets.new_zeros(num_rows, *of_targets.shape[1:])
    return everywhere.index_copy_(0, rows, of_targets)


def _add_product(d_weight: Tensor, d_logits: Tensor, x: Tensor) -> None:
    """d_weight (V, H) += d_logits (C, V).T @ x (C, H), in the dtype of d_weight."""
    if d_weight.dtype == x.dtype:
        d_weight.addmm_(d_logits.t(), x)
    elif x.is_cuda:
        torch.addmm(d_weight, d_logits.t(), x, out_dtype=d_weight.dtype, out=d_weight)
    else:  # addmm knows out_dtype on CUDA only
        d_weight.addmm_(d_logits.t().to(d_weight.dtype), x.to(d_weight.dtype))


def _target_rows(labels: Tensor, ignore_index: int, num_targets: int | None) -> Tensor:
    """Indices of the rows that have a target; on CUDA without a sync when their number is known."""
    is_target = labels != ignore_index
    if num_targets is None:
        return is_target.nonzero().squeeze(1)
    return is_target.nonzero_static(size=num_targets).squeeze(1)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_labels(
    labels: Tensor, vocabulary: int, ignore_index: int, num_targets: int | None
) -> None:
    """Refuse labels that would silently give a wrong loss; on CUDA without a sync."""
    is_target = labels != ignore_index
    in_range = (~is_target | ((labels >= 0) & (labels < vocabulary))).all()
    counted = is_target.sum() == (is_target.sum() if num_targets is None else num_targets)
    if labels.is_cuda:
        torch._assert_async(in_range, "linear_cross_entropy: a label lies outside 0..V-1")
        torch._assert_async(counted, "linear_cross_entropy: num_targets is not the targets' number")
        return
    if not in_range:
        raise ValueError(
            f"linear_cross_entropy: labels must lie in 0..{vocabulary - 1} or be {ignore_index}, "
            f"got {labels.min().item()}..{labels.max().item()}; check the tokenizer's vocabulary"
        )
    if not counted:
        raise ValueError(
            f"linear_cross_entropy: num_targets must be the number of labels that are not "
            f"{ignore_index}, {is_target.sum().item()}, got {num_targets}; count them anew"
        )
