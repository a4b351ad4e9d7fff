# mypy: allow-untyped-defs
# (the arguments of a kernel are typed by Triton)
"""Cross entropy of a chunk of logits on Triton; the op is in ../linear_cross_entropy.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 8192


def cross_entropy_in_place(logits: Tensor, labels: Tensor, wants_gradients: bool) -> Tensor:
    """Return the loss of each row and turn the logits into their gradients, where they lie.

    logits: (C, V), contiguous, overwritten by softmax(logits) - onehot(label) when
    `wants_gradients`; labels: (C,) int64 within 0..V-1. Returns (C,) float32. The row is read
    twice (once from HBM, then mostly from L2) and written once.
    """
    num_rows, vocabulary = logits.shape
    losses = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    if num_rows:
        _cross_entropy_kernel[(num_rows,)](
            logits,
            labels,
            losses,
            vocabulary,
            WANTS_GRADIENTS=wants_gradients,
            BLOCK=min(_BLOCK, triton.next_power_of_2(vocabulary)),
            num_warps=8,
        )
    return losses


@triton.jit
def _cross_entropy_kernel(
    logits_ptr,
    labels_ptr,
    losses_ptr,
    vocabulary,
    WANTS_GRADIENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * vocabulary
    label = tl.load(labels_ptr + row)

    peak = -3.0e38  # finite, so that exp(-inf - peak) is 0 and not nan for masked logits
    total = 0.0  # sum of exp(logit - peak)
    target = 0.0  # the logit of the label
    for start in range(0, vocabulary, BLOCK):
        col = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + col, mask=col < vocabulary, other=-float("inf")).to(tl.float32)
        new_peak = tl.maximum(peak, tl.max(x, axis=0))
        total = total * tl.exp(peak - new_peak) + tl.sum(tl.exp(x - new_peak), axis=0)
        target += tl.sum(tl.where(col == label, x, 0.0), axis=0)
        peak = new_peak
    tl.store(losses_ptr + row, peak + tl.log(total) - target)

    if WANTS_GRADIENTS:
        for start in range(0, vocabulary, BLOCK):
            col = start + tl.arange(0, BLOCK)
            x = tl.load(logits_ptr + col, mask=col < vocabulary, other=-float("inf"))
            probability = tl.exp(x.to(tl.float32) - peak) / total
            gradient = tl.where(col == label, probability - 1.0, probability)
            tl.store(logits_ptr + col, gradient, mask=col < vocabulary)
