"""Cross entropy of a linear layer, summed over the targets, without the (N, V) logits.

loss = sum over targets t of logsumexp(z_t) - z_t[label_t], with z = hidden_states @ weight.T + bias

The scheme (chunks of rows, gradients computed in the forward, logits turned into their gradients
in place) is that of Liger Kernel (arXiv 2410.10989), with QuACK's large chunks and float32
accumulation of the weight's gradient.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import choose


def linear_cross_entropy(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    chunk_rows: int = 4096,
    num_targets: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Sum the cross entropy of the rows whose label is not `ignore_index`.

    hidden_states: (N, H); weight: (V, H); labels: (N,) int64; bias: (V,). Returns () float32
    (float64 for float64 inputs); no targets give 0 with zero gradients. Ignored rows cost no
    matrix product. At most (chunk_rows, V) logits are held, in the dtype of hidden_states; the
    gradients are computed here and wait, in the dtypes of their tensors, for the backward.

    num_targets is the number of labels that are not ignored. On CUDA give it where it is known:
    counting them waits for the device. A wrong count, or a label outside 0..V-1, raises ValueError
    on the CPU and trips a device-side assertion on CUDA, as do shapes that do not fit (ValueError).
    """
    _check_shapes(hidden_states, weight, labels, bias, chunk_rows)
    name = choose("linear_cross_entropy", hidden_states, backend)
    if name == "reference":
        return linear_cross_entropy_ref(
            hidden_states, weight, labels, bias=bias, ignore_index=ignore_index
        )
    if torch.is_autocast_enabled(hidden_states.device.type):
        dtype = torch.get_autocast_dtype(hidden_states.device.type)
        hidden_states, weight = hidden_states.to(dtype), weight.to(dtype)
        bias = bias if bias is None else bias.to(dtype)
    _check_labels(labels, weight.shape[0], ignore_index, num_targets)
    rows = _target_rows(labels, ignore_index, num_targets)
    # Inside forward() grad mode is always off, so the question is asked here.
    wants = tuple(
        torch.is_grad_enabled() and x is not None and x.requires_grad
        for x in (hidden_states, weight, bias)
    )
    return _LinearCrossEntropy.apply(
        hidden_states, weight, bias, labels, rows, chunk_rows, name, wants
    )


def linear_cross_entropy_ref(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """`linear_cross_entropy` in plain torch, with all the logits at once."""
    logits = F.linear(hidden_states, weight, bias)  # (N, V)
    return F.cross_entropy(_widen(logits), labels, ignore_index=ignore_index, reduction="sum")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        rows: Tensor,
        chunk_rows: int,
        name: str,
        wants: tuple[bool, bool, bool],
    ) -> Tensor:
        wide = _wide(hidden_states.dtype)
        num_chunks = max(1, -(-len(rows) // chunk_rows))
        # The sum over several chunks is kept in float32; a single product rounds only once anyway.
        d_weight_dtype = wide if num_chunks > 1 else weight.dtype
        d_hidden = hidden_states.new_empty(len(rows), weight.shape[1]) if wants[0] else None
        d_weight = torch.zeros_like(weight, dtype=d_weight_dtype) if wants[1] else None
        d_bias = weight.new_zeros(weight.shape[0], dtype=wide) if wants[2] else None
        loss = hidden_states.new_zeros((), dtype=wide)
        start = 0
        # Chunks of one size: a short last one would read the whole weight for a few rows.
        for chunk in rows.split(max(1, -(-len(rows) // num_chunks))):
            x = hidden_states.index_select(0, chunk)  # (C, H)
            logits = F.linear(x, weight, bias)  # (C, V)
            loss += _cross_entropy_in_place(name, logits, labels[chunk], any(wants)).sum()
            if d_hidden is not None:
                torch.mm(logits, weight, out=d_hidden[start : start + len(chunk)])
            if d_weight is not None:
                _add_product(d_weight, logits, x)
            if d_bias is not None:
                d_bias += logits.sum(0, dtype=wide)
            start += len(chunk)
            del logits  # or the next chunk's would be computed while these are still held
        d_weight = d_weight if d_weight is None else d_weight.to(weight.dtype)
        d_bias = d_bias if d_bias is None or bias is None else d_bias.to(bias.dtype)
        ctx.save_for_backward(d_hidden, d_weight, d_bias, rows)
        ctx.num_rows = len(hidden_states)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight, d_bias, rows = ctx.saved_tensors
        if d_hidden is not None:
            of_targets = d_hidden * d_loss
            d_hidden = d_hidden.new_zeros(ctx.num_rows, d_hidden.shape[1])
            d_hidden.index_copy_(0, rows, of_targets)
        d_weight = d_weight if d_weight is None else d_weight * d_loss
        d_bias = d_bias if d_bias is None else d_bias * d_loss
        return d_hidden, d_weight, d_bias, None, None, None, None, None


def _cross_entropy_in_place(
    name: str, logits: Tensor, labels: Tensor, wants_gradients: bool
) -> Tensor:
    """-> loss per row (C,); logits (C, V) become their gradients when these are wanted."""
    if name == "triton":
        from .triton_ops import cross_entropy as kernels

        return kernels.cross_entropy_in_place(logits, labels, wants_gradients)
    wide = _widen(logits)
    lse = wide.logsumexp(-1, keepdim=True)
    target = labels[:, None]
    losses = (lse - wide.gather(1, target)).squeeze(1)
    if wants_gradients:
        wide.sub_(lse).exp_().scatter_add_(1, target, wide.new_full(target.shape, -1.0))
        if wide is not logits:
            logits.copy_(wide)
    return losses


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


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _widen(x: Tensor) -> Tensor:
    return x.to(_wide(x.dtype))


def _check_shapes(
    hidden_states: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, chunk_rows: int
) -> None:
    fits = (
        hidden_states.dim() == weight.dim() == 2
        and hidden_states.shape[1] == weight.shape[1]
        and labels.shape == hidden_states.shape[:1]
        and (bias is None or bias.shape == weight.shape[:1])
    )
    if not fits:
        shapes = [tuple(x.shape) for x in (hidden_states, weight, labels, bias) if x is not None]
        raise ValueError(
            f"linear_cross_entropy: hidden_states, weight, labels, bias must be (N, H), (V, H), "
            f"(N,), (V,), got {', '.join(map(str, shapes))}; flatten the batch first"
        )
    if chunk_rows < 1:
        raise ValueError(
            f"linear_cross_entropy: chunk_rows must be at least 1, got {chunk_rows}; "
            f"leave it at its default"
        )


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
