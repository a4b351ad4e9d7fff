"""The backward of ops that keep nothing but their inputs: the forward runs again."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .autograd import recording


def recomputed_gradients(
    forward: Callable[..., Tensor | tuple[Tensor, ...]],
    tensors: Sequence[Tensor],
    upstream: Sequence[Tensor],
) -> list[Tensor]:
    """The gradient of each of `tensors`, zeros where the outputs do not depend on it.

    Each is a contiguous tensor of its own, as a torch.library op must return it.
    """
    leaves = [x.detach().requires_grad_() for x in tensors]
    with recording():
        outputs = forward(*leaves)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        pairs = [(y, dy) for y, dy in zip(outputs, upstream, strict=True) if y.requires_grad]
        if not pairs:
            return [torch.zeros_like(x) for x in tensors]
        kept, given = zip(*pairs, strict=True)
        gradients = torch.autograd.grad(kept, leaves, given, allow_unused=True)
    return [
        torch.zeros_like(x) if dx is None else dx.contiguous()
        for x, dx in zip(leaves, gradients, strict=True)
    ]
