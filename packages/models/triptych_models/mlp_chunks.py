"""An MLP over a long row in chunks, so that its wide activations exist for one chunk at a time."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Forward = Callable[[Tensor], Tensor]


def chunk_mlp(mlp: nn.Module, chunks: int) -> None:
    """Let an MLP take its tokens in chunks, on this instance; names of parameters stay."""
    mlp.forward = partial(in_chunks, mlp.forward, chunks)


def in_chunks(forward: Forward, chunks: int, x: Tensor) -> Tensor:
    """forward (…, n, H) → (…, n, H') on `chunks` stretches of x (…, T, H), one after the other.

    Each is computed again in its backward. No token looks at another in an MLP, so values and
    gradients are those of the whole; a weight's gradient is the sum over chunks. Under ZeRO-3 the
    layer around it is what is gathered, once for all chunks.
    """
    parts = x.chunk(chunks, -2)
    if not torch.is_grad_enabled():
        return torch.cat([forward(part) for part in parts], -2)
    again = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([again(part) for part in parts], -2)
