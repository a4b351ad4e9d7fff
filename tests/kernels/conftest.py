"""What the kernel tests share: one comparison with float64, and its tolerances.

Needs torch, pytest and triptych-kernels alone, so that the package can be tested by itself.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

# Largest ||x - reference|| / ||reference|| against float64, for outputs and gradients alike. A
# value rounded once has about a quarter of the dtype's eps (3e-8, 2e-3); the rest is room for the
# roundings inside. float32 needs most of it for a matrix product of a few rows over thousands of
# columns, which some CPUs' BLAS computes to 2e-6.
TOLERANCES = {torch.float32: 5e-6, torch.bfloat16: 1.2e-2, torch.float64: 1e-12}

_Op = Callable[..., Tensor]


@pytest.fixture
def check() -> Callable[..., None]:
    """`check(op, exact, *tensors)`: op's output and gradients against exact's in float64."""
    return _check


@pytest.fixture
def poison() -> Iterator[None]:
    """Fill every torch.empty with NaN, so that what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def _check(op: _Op, exact: _Op, *tensors: Tensor) -> None:
    ours, _ = _run(op, [x.detach().requires_grad_() for x in tensors])
    wanted, upstream = _run(exact, [x.detach().double().requires_grad_() for x in tensors])
    tolerance = TOLERANCES[tensors[0].dtype]
    assert ours[0].shape == wanted[0].shape
    for what, got, want in zip(["output", *range(len(tensors))], ours, wanted, strict=True):
        # A gradient that is zero because terms cancel is measured against what cancels.
        size = max(want.norm(), upstream.norm())
        distance = (got.double() - want).norm()
        assert distance <= tolerance * size, f"{what}: {distance / size:.1e} > {tolerance:.1e}"


def _run(op: _Op, tensors: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """-> the output and the gradient of each tensor; the gradient that was fed in."""
    out = op(*tensors)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, tensors, upstream)], upstream
