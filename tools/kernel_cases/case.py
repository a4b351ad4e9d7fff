"""What a check consists of: an op beside its plain form, and the tensors for both."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

HALF = torch.bfloat16
RAGGED = [0, 1, 63, 0, 700, 257, 1]  # lengths of documents
DTYPES = (HALF, torch.float32)


@dataclass(frozen=True)
class Case:
    """An op on some inputs: `ours` against `plain` torch, which computes in any dtype."""

    op: str
    what: str
    dtype: torch.dtype
    tensors: list[Tensor]  # the differentiable inputs
    ours: Callable[..., Any]  # -> a tensor or a tuple of tensors
    plain: Callable[..., Any]
    differentiable: bool = True
    slack: float = 0.0  # allowed error where `plain` computes wider than the op; 0: the dtype's
    waits: bool = False  # the op reads from the device, so that neither sync nor graph is checked


def randn(*shape: int, dtype: torch.dtype = HALF, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def bounds_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
