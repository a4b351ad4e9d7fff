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
    d_weight: Tensor | None  # float32 where it was added up over chunks
    d_bias: Tensor | None  # float32
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
    d_hidden = hidden_states.new_empty(len(rows), weight.shape[1]) if wants[0] else None
    d_weight = _weight_gradient(weight, len(rows), num_chunks) if wants[1] else None
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
            _add_product(d_weight, logits, x, is_first=start == 0)
        if d_bias is not None:
            d_bias += logits.sum(0, dtype=wide)
        start += len(chunk)
        del logits  # or the next chunk's would be computed while these are still held
    return Result(losses.sum(), losses, d_hidden, d_weight, d_bias, rows)


def spread(of_targets: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """(R, ...) -> (N, ...), zero in the rows without a target."""
    everywhere = of_targets.new_zeros(num_rows, *of_targets.shape[1:])
    return everywhere.index_copy_(0, rows, of_targets)


def scaled(gradient: Tensor | None, d_loss: Tensor, dtype: torch.dtype) -> Tensor | None:
    """gradient * d_loss in `dtype`, in one pass over memory; None stays None."""
    if gradient is None:
        return None
    return torch.mul(gradient, d_loss, out=gradient.new_empty(gradient.shape, dtype=dtype))


def _weight_gradient(weight: Tensor, num_rows: int, num_chunks: int) -> Tensor:
    """Room for the weight's gradient; zeros where no product will be written there."""
    # The sum over several chunks is kept in float32; a single product rounds only once anyway.
    dtype = wide_dtype(weight.dtype) if num_chunks > 1 else weight.dtype
    make = torch.empty_like if num_rows else torch.zeros_like
    return make(weight, dtype=dtype, memory_format=torch.contiguous_format)


def _add_product(d_weight: Tensor, d_logits: Tensor, x: Tensor, is_first: bool) -> None:
    """d_weight (V, H) += d_logits (C, V).T @ x (C, H) in the dtype of d_weight; = if `is_first`."""
    y = d_logits.t()
    if d_weight.dtype != x.dtype and not x.is_cuda:  # out_dtype exists on CUDA only
        y, x = y.to(d_weight.dtype), x.to(d_weight.dtype)
    if d_weight.dtype == x.dtype:
        product = torch.mm(y, x, out=d_weight) if is_first else d_weight.addmm_(y, x)
    elif is_first:
        product = torch.mm(y, x, out_dtype=d_weight.dtype, out=d_weight)
    else:
        product = torch.addmm(d_weight, y, x, out_dtype=d_weight.dtype, out=d_weight)
    assert product is d_weight


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
