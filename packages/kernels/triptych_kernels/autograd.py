"""What the autograd.Functions of the ops share."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.function import once_differentiable


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """`once_differentiable`, but free (10 us of host time less) unless a graph is being built."""
    guarded = once_differentiable(backward)

    def differentiate(ctx: Any, *gradients: Any) -> Any:
        return (guarded if torch.is_grad_enabled() else backward)(ctx, *gradients)

    return differentiate


@contextmanager
def recording() -> Iterator[None]:
    """Record a graph inside a torch.library op, which runs beneath autograd's dispatch keys.

    `torch.enable_grad()` alone is not enough there: a library's autograd.Function would still make
    a node, but a view of what it returns would lose it.
    """
    keys = torch._C.DispatchKey
    with torch._C._PreserveDispatchKeyGuard(), torch.enable_grad():
        for key in (keys.AutogradFunctionality, keys.AutogradOther, keys.AutogradNestedTensor):
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
        yield
