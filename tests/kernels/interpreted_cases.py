"""The Triton kernels on the CPU, in float32 (the interpreter computes bfloat16 wrong).

Run by test_interpreted.py, or: TRITON_INTERPRET=1 pytest and this file's path.
A program takes milliseconds here, so the shapes are small.
"""

import pytest
import torch

from triptych_kernels import (
    explain,
    linear_cross_entropy,
    linear_cross_entropy_ref,
    rms_norm,
    rms_norm_ref,
    swiglu,
    swiglu_ref,
)
from triptych_kernels.triton_ops import rms_norm as rms_norm_kernels

pytestmark = pytest.mark.usefixtures("poison")


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_float32_takes_the_kernels():
    table = explain("cpu", torch.float32)
    for op in ("linear_cross_entropy", "rms_norm", "swiglu"):
        assert f"{op:<23} triton     runs" in table
    with pytest.raises(ValueError, match="interpreter needs float32"):
        swiglu(randn(2, 4).bfloat16(), randn(2, 4).bfloat16(), backend="triton")


@pytest.mark.parametrize("shape", [(1, 1), (3, 760), (2, 5, 63), (0, 8), (9, 4097)])
def test_rms_norm(check, shape):
    check(rms_norm, rms_norm_ref, randn(*shape), randn(shape[-1], seed=1))


def test_rms_norm_adds_the_partial_sums_of_its_programs(check, monkeypatch):
    monkeypatch.setattr(rms_norm_kernels, "_TILE", 64)  # 2 rows a tile, 7 tiles, 2 programs
    check(rms_norm, rms_norm_ref, randn(13, 30), randn(30, seed=1))


def test_rms_norm_non_contiguous(check):
    check(
        lambda x, w: rms_norm(x[:, 3:19].transpose(0, 1), w),
        lambda x, w: rms_norm_ref(x[:, 3:19].transpose(0, 1), w),
        randn(2, 30, 4),
        randn(4, seed=1),
    )
    check(
        lambda x, w: rms_norm(x[:, ::2], w),
        lambda x, w: rms_norm_ref(x[:, ::2], w),
        randn(3, 10),
        randn(5, seed=1),
    )


@pytest.mark.parametrize("shape", [(1,), (3, 760), (2, 2, 63), (0, 8), (2, 1025)])
def test_swiglu(check, shape):
    check(swiglu, swiglu_ref, randn(*shape), randn(*shape, seed=1))


def test_swiglu_two_halves_of_one_projection(check):
    def on(op):
        return lambda x: op(*x.chunk(2, dim=-1))

    check(on(swiglu), on(swiglu_ref), randn(3, 34))


@pytest.mark.parametrize(("num_rows", "vocabulary"), [(1, 63), (9, 760), (5, 9001)])
@pytest.mark.parametrize("chunk_rows", [4096, 2])
def test_linear_cross_entropy(check, num_rows, vocabulary, chunk_rows):
    labels = torch.randint(vocabulary, (num_rows,), generator=torch.Generator().manual_seed(2))
    labels[1::3] = -100
    check(
        lambda x, w: linear_cross_entropy(x, w, labels, chunk_rows=chunk_rows),
        lambda x, w: linear_cross_entropy_ref(x, w, labels),
        randn(num_rows, 16),
        randn(vocabulary, 16, seed=1),
    )


def test_linear_cross_entropy_without_targets_and_without_grad():
    x, weight = randn(4, 16).requires_grad_(), randn(9, 16, seed=1)
    loss = linear_cross_entropy(x, weight, torch.full((4,), -100))
    assert loss.item() == 0 and not torch.autograd.grad(loss, x)[0].any()
    labels = torch.tensor([1, 2, -100, 8])
    with torch.no_grad():
        ours = linear_cross_entropy(x, weight, labels)
    torch.testing.assert_close(ours, linear_cross_entropy_ref(x, weight, labels).detach())


def test_masked_logits():
    bias = torch.zeros(9000)
    bias[:8500] = -torch.inf  # the whole first block
    x, weight = randn(2, 16).requires_grad_(), randn(9000, 16, seed=1)
    labels = torch.tensor([8700, 8999])
    ours = linear_cross_entropy(x, weight, labels, bias=bias)
    plain = linear_cross_entropy_ref(x, weight, labels, bias=bias)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(*(torch.autograd.grad(loss, x)[0] for loss in (ours, plain)))


def test_backward_gives_the_same_bits_twice():
    x, weight = randn(40, 200).requires_grad_(), randn(200, seed=1).requires_grad_()
    first, second = (
        torch.autograd.grad(rms_norm(x, weight).square().sum(), (x, weight)) for _ in range(2)
    )
    assert all(map(torch.equal, first, second))
