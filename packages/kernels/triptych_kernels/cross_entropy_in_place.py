"""Cross entropy of a chunk of logits, which become their gradients where they lie.

With z the logits, z_c = c tanh(z / c) where they are capped, lse = logsumexp(z_c), smoothing s:

loss = w (lse - (1 - s) z_c[label] - s mean(z_c) + z_loss lse^2)
d loss / d z = w (softmax(z_c) (1 + 2 z_loss lse) - (1 - s) onehot(label) - s / V) (1 - (z_c / c)^2)
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Terms(NamedTuple):
    """What the cross entropy has beside its plain form; see `linear_cross_entropy`."""

    z_loss: float = 0.0
    softcap: float | None = None
    label_smoothing: float = 0.0


def cross_entropy_in_place(
    backend: str,
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    terms: Terms,
    wants_gradients: bool,
) -> Tensor:
    """-> loss per row (C,); logits (C, V) become their gradients when these are wanted.

    labels: (C,) int64 within 0..V-1; weights: (C,) in the dtype of
    the arithmetic, float32 or float64. Without gradients the logits' values are lost.
    """
    if backend == "triton":
        from .triton_ops import cross_entropy as kernels

        return kernels.cross_entropy_in_place(logits, labels, weights, terms, wants_gradients)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    if terms.softcap is not None:
        wide.div_(terms.softcap).tanh_().mul_(terms.softcap)
    lse, target = wide.logsumexp(-1, keepdim=True), labels[:, None]
    losses = _losses(wide, lse, target, weights, terms)
    if wants_gradients:
        _differentiate(wide, lse, target, weights, terms)
        if wide is not logits:
            logits.copy_(wide)
    return losses


def _losses(
    logits: Tensor, lse: Tensor, target: Tensor, weights: Tensor | None, terms: Terms
) -> Tensor:
    """logits (C, V), capped; lse, target (C, 1) -> (C,)."""
    smoothing = terms.label_smoothing
    losses = lse - logits.gather(1, target) * (1 - smoothing)
    if smoothing:
        losses = losses - smoothing * logits.mean(-1, keepdim=True)
    if terms.z_loss:
        losses = losses + terms.z_loss * lse.square()
    losses = losses.squeeze(1)
    return losses if weights is None else losses * weights


def _differentiate(
    logits: Tensor, lse: Tensor, target: Tensor, weights: Tensor | None, terms: Terms
) -> None:
    slope = None
    if terms.softcap is not None:
        slope = 1 - (logits / terms.softcap).square_()
    logits.sub_(lse).exp_()  # the softmax
    if terms.z_loss:
        logits.mul_(1 + 2 * terms.z_loss * lse)
    hit = logits.new_full(target.shape, terms.label_smoothing - 1.0)
    logits.scatter_add_(1, target, hit)
    if terms.label_smoothing:
        logits.sub_(terms.label_smoothing / logits.shape[1])
    if slope is not None:
        logits.mul_(slope)
    if weights is not None:
        logits.mul_(weights[:, None])
