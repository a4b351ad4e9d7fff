"""What the autograd.Functions of the ops share."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward whose gradients raise when they are differentiated with respect to what it saved.

    torch's `once_differentiable` ties them to nothing: a penalty on them silently has no gradient
    where `torch.autograd.grad` asks for it, or where the gradient that comes in is a constant, as
    that of a loss is. It also costs 10 us of host time a call, this only where a graph is built.
    """

    def differentiate(ctx: Any, *incoming: Tensor) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *incoming)
        with torch.no_grad():
            gradients = backward(ctx, *incoming)
        tensors = [x for x in gradients if x is not None]
        once = iter(_Once.apply(len(tensors), *tensors, *incoming, *ctx.saved_tensors))
        return tuple(None if x is None else next(once) for x in gradients)

    return differentiate


class _Once(torch.autograd.Function):
    """The first `count` tensors, which depend on the others in a way that is not known."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.detach() for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError(
            "triptych_kernels: a kernel's gradients must not be differentiated, got a backward "
            "through them; run that op on its backend 'reference'"
        )


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
