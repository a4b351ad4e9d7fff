# mypy: allow-untyped-defs
# (the arguments of a kernel are typed by Triton)
"""Cross entropy of a chunk of logits on Triton; the formula is in ../cross_entropy_in_place.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..cross_entropy_in_place import Terms

# Columns a program holds at a time, and its warps: 1.11 ms for 4,096 x 151,936 logits on an H100,
# where 1.30 was the best that one running maximum for all columns reached.
_BLOCK = 8192
_WARPS = 16


def cross_entropy_in_place(
    logits: Tensor, labels: Tensor, weights: Tensor | None, terms: Terms, wants_gradients: bool
) -> Tensor:
    """Return the loss of each row and turn the logits into their gradients, where they lie.

    logits: (C, V), contiguous, overwritten when `wants_gradients`; labels: (C,) int64 within
    0..V-1; weights: (C,) float32. Returns (C,) float32. The row is read twice, the second time from
    its end, where the L2 cache still holds some of it, and written once.
    """
    num_rows, vocabulary = logits.shape
    losses = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    if num_rows:
        block = min(_BLOCK, triton.next_power_of_2(vocabulary))
        _cross_entropy_kernel[(num_rows,)](
            logits,
            labels,
            losses if weights is None else weights,
            losses,
            vocabulary,
            float(terms.z_loss),
            float(terms.softcap or 1.0),
            float(terms.label_smoothing),
            HAS_WEIGHTS=weights is not None,
            HAS_Z_LOSS=terms.z_loss != 0,
            HAS_SOFTCAP=terms.softcap is not None,
            HAS_SMOOTHING=terms.label_smoothing != 0,
            WANTS_GRADIENTS=wants_gradients,
            BLOCK=block,
            num_warps=max(1, _WARPS * block // _BLOCK),
        )
    return losses


@triton.jit
def _tanh(x):
    # No tanh of libdevice: the interpreter has none. exp(-2 |x|) does not overflow.
    decay = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - decay) / (1.0 + decay)
    return tl.where(x < 0, -size, size)


@triton.jit
def _load(logits_ptr, col, vocabulary, softcap, HAS_SOFTCAP: tl.constexpr):
    """The logits of some columns, capped; -inf beyond the last."""
    x = tl.load(logits_ptr + col, mask=col < vocabulary, other=-float("inf")).to(tl.float32)
    if HAS_SOFTCAP:
        x = tl.where(col < vocabulary, softcap * _tanh(x / softcap), -float("inf"))
    return x


@triton.jit
def _sums(
    logits_ptr,
    vocabulary,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """-> the largest logit, the sum of exp(logit - largest), and the sum of all logits."""
    # Each lane keeps its own maximum: the loop holds no reduction, so loads run ahead of it. It is
    # finite at first, so that exp(-inf - peak) is 0 and not nan for masked logits.
    peaks = tl.full((BLOCK,), -3.0e38, dtype=tl.float32)
    totals = tl.zeros((BLOCK,), dtype=tl.float32)
    plain_sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, vocabulary, BLOCK):
        col = start + tl.arange(0, BLOCK)
        x = _load(logits_ptr, col, vocabulary, softcap, HAS_SOFTCAP)
        new_peaks = tl.maximum(peaks, x)
        totals = totals * tl.exp(peaks - new_peaks) + tl.exp(x - new_peaks)
        if HAS_SMOOTHING:
            plain_sums += tl.where(col < vocabulary, x, 0.0)
        peaks = new_peaks
    peak = tl.max(peaks, axis=0)
    total = tl.sum(totals * tl.exp(peaks - peak), axis=0)
    return peak, total, tl.sum(plain_sums, axis=0)


@triton.jit
def _cross_entropy_kernel(
    logits_ptr,
    labels_ptr,
    weights_ptr,
    losses_ptr,
    vocabulary,
    z_loss,
    softcap,
    smoothing,
    HAS_WEIGHTS: tl.constexpr,
    HAS_Z_LOSS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    WANTS_GRADIENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * vocabulary
    label = tl.load(labels_ptr + row)
    target = tl.load(logits_ptr + label).to(tl.float32)
    if HAS_SOFTCAP:
        target = softcap * _tanh(target / softcap)
    peak, total, plain_sum = _sums(
        logits_ptr, vocabulary, softcap, HAS_SOFTCAP, HAS_SMOOTHING, BLOCK
    )
    lse = peak + tl.log(total)
    weight = 1.0
    if HAS_WEIGHTS:
        weight = tl.load(weights_ptr + row)
    # d loss / d logit = by_softmax * exp(logit - peak) - by_label * onehot - by_class
    by_softmax = weight / total
    by_label = weight
    by_class = 0.0
    loss = lse - target
    if HAS_SMOOTHING:
        loss = lse - (1.0 - smoothing) * target - smoothing / vocabulary * plain_sum
        by_label = weight * (1.0 - smoothing)
        by_class = weight * (smoothing / vocabulary)
    if HAS_Z_LOSS:
        loss += z_loss * lse * lse
        by_softmax *= 1.0 + 2.0 * z_loss * lse
    tl.store(losses_ptr + row, weight * loss)

    if WANTS_GRADIENTS:
        num_blocks = tl.cdiv(vocabulary, BLOCK)
        for block in range(0, num_blocks):
            col = (num_blocks - 1 - block) * BLOCK + tl.arange(0, BLOCK)
            x = _load(logits_ptr, col, vocabulary, softcap, HAS_SOFTCAP)
            gradient = tl.exp(x - peak) * by_softmax - by_class
            gradient = tl.where(col == label, gradient - by_label, gradient)
            if HAS_SOFTCAP:
                bent = tl.where(col < vocabulary, x / softcap, 0.0)
                gradient *= 1.0 - bent * bent
            tl.store(logits_ptr + col, gradient, mask=col < vocabulary)
