"""Cases of AdamW, which works in place: every call gets copies of its tensors."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .case import HALF, Case, randn

OPTIONS = {"lr": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def adamw_case(
    sizes: tuple[int, ...], grads: torch.dtype, states: torch.dtype, offset: int = 0
) -> Case:
    """N parameters of these sizes; all tensors start `offset` elements past an aligned address."""
    from triptych_kernels import adamw_, adamw_ref

    scale = torch.tensor(0.7, device="cuda")

    def apart(x: Tensor) -> Tensor:
        return torch.cat([x.new_zeros(offset), x.flatten()])[offset:]

    def on(op: Callable[..., None]) -> Callable[..., Any]:
        def call(*tensors: Tensor) -> tuple[Tensor, ...]:
            n = len(sizes)
            held = [apart(x) for x in tensors]
            params, moments = held[:n], (held[2 * n : 3 * n], held[3 * n :])
            copies = [None, *(torch.zeros_like(p, dtype=HALF) for p in params[1:])]
            more = {**OPTIONS, "step": 3, "grad_scale": scale.to(params[0].dtype), "copies": copies}
            op(params, held[n : 2 * n], *moments, **more)
            # A copy is its own parameter's rounding; another's may lie on the other side of a tie.
            rounded = zip(copies[1:], params[1:], strict=True)
            kept = [1.0 + (copy != p.to(HALF)) for copy, p in rounded]
            return *params, *moments[0], *moments[1], *kept

        return call

    tensors = [randn(size, dtype=torch.float32, seed=i) for i, size in enumerate(sizes)]
    tensors += [randn(size, dtype=grads, seed=9 + i) for i, size in enumerate(sizes)]
    tensors += [randn(size, dtype=states, seed=19 + i) for i, size in enumerate(sizes)]
    tensors += [randn(size, dtype=states, seed=29 + i).square() for i, size in enumerate(sizes)]
    names = f"g {str(grads)[6:]} s {str(states)[6:]}"
    what = f"{len(sizes)} of {max(sizes)} {names}{f' +{offset}' if offset else ''}"
    # Stochastic rounding errs by up to a whole digit, and otherwise on either side.
    slack = 4e-3 if states == HALF else 0.0
    return Case("adamw", what, torch.float32, tensors, on(adamw_), on(adamw_ref), False, slack)


def adamw_cases() -> Iterator[Case]:
    for grads in (HALF, torch.float32):
        for states in (torch.float32, HALF):
            yield adamw_case((1, 1023, 0, 4096, 100_003), grads, states)
            yield adamw_case((5, 5000), grads, states, offset=1)


def adamw_timed() -> Iterator[Case]:
    yield adamw_case((2**24,) * 4, HALF, torch.float32)
    yield adamw_case((2**24,) * 4, HALF, HALF)
