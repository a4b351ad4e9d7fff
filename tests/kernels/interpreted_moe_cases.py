"""The Triton code of moe_mlp, newton_schulz and weighted_sum on the CPU, in float32.

Run by test_interpreted.py, or: TRITON_INTERPRET=1 pytest and this file's path.
A program takes milliseconds here, so the shapes are small.
"""

import pytest
import torch

from triptych_kernels import (
    moe_mlp,
    moe_mlp_ref,
    newton_schulz,
    newton_schulz_ref,
    weighted_sum,
    weighted_sum_ref,
)
from triptych_kernels.triton_ops import moe as moe_kernels
from triptych_kernels.triton_ops import newton_schulz as newton_schulz_kernels

pytestmark = pytest.mark.usefixtures("poison")


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def experts_of(tokens, num_experts, top_k):
    noise = torch.rand(tokens, num_experts, generator=torch.Generator().manual_seed(9))
    return noise.argsort(1)[:, :top_k]


@pytest.mark.parametrize(
    ("tokens", "hidden", "width", "num_experts", "top_k"),
    [(7, 16, 8, 5, 2), (1, 4, 12, 3, 1), (3, 12, 68, 4, 3), (2, 1028, 4, 9, 2)],
)
def test_moe_mlp(check, monkeypatch, tokens, hidden, width, num_experts, top_k):
    monkeypatch.setattr(moe_kernels, "_BLOCK", 64)  # several blocks a row
    experts = experts_of(tokens, num_experts, top_k)
    check(
        lambda *a: moe_mlp(*a, experts, backend="triton"),
        lambda *a: moe_mlp_ref(*a, experts),
        randn(tokens, hidden),
        randn(num_experts, 2 * width, hidden, seed=1) / hidden**0.5,
        randn(num_experts, hidden, width, seed=2),
        randn(tokens, top_k, seed=3),
    )


def test_moe_mlp_of_a_part(check):
    experts = experts_of(7, 6, 3)
    check(
        lambda *a: moe_mlp(*a, experts, part=(1, 2), backend="triton"),
        lambda *a: moe_mlp_ref(*a, experts, part=(1, 2)),
        randn(7, 16),
        randn(3, 16, 16, seed=1) / 4,
        randn(3, 16, 8, seed=2),
        randn(7, 3, seed=3),
    )


def test_moe_mlp_without_tokens_and_with_one_expert_for_all(check):
    matrices = randn(3, 16, 8, seed=1), randn(3, 8, 8, seed=2)
    assert moe_mlp(randn(0, 8), *matrices, randn(0, 2), experts_of(0, 3, 2)).shape == (0, 8)
    experts = torch.full((5, 1), 2)
    check(
        lambda *a: moe_mlp(*a, experts),
        lambda *a: moe_mlp_ref(*a, experts),
        randn(5, 8),
        *matrices,
        randn(5, 1, seed=3),
    )


@pytest.mark.parametrize("shape", [(1, 5, 7), (2, 64, 64), (1, 130, 33), (1, 70, 128)])
@pytest.mark.parametrize("few_tiles", [0, 264])  # the large tiles, the small ones
def test_symmetric_product(monkeypatch, shape, few_tiles):
    monkeypatch.setattr(newton_schulz_kernels, "_FEW_TILES", few_tiles)
    x = randn(*shape)
    y = newton_schulz_kernels.symmetric_product(x, x, None, 1.0, 0.0)
    torch.testing.assert_close(y, x @ x.mT, atol=1e-4, rtol=1e-5)
    assert torch.equal(y, y.mT)
    z = newton_schulz_kernels.symmetric_product(y, y, y, -0.5, 2.0)
    torch.testing.assert_close(z, 2 * y - 0.5 * y @ y, atol=1e-2, rtol=1e-4)
    assert torch.equal(z, z.mT)


@pytest.mark.parametrize("form", ["standard", "gram"])
def test_newton_schulz(form):
    g = randn(2, 20, 70)
    y = newton_schulz(g, form=form, compute_dtype=torch.float32, backend="triton")
    want = newton_schulz_ref(g.double())
    assert (y - want).norm() < 2e-5 * want.norm()
    with pytest.raises(ValueError, match="interpreter needs float32"):
        newton_schulz(g, backend="triton")


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weighted_sum(count, dtype):
    given = [randn(3, 701, seed=seed) for seed in range(count)]
    weights = [0.1, 0.37, 0.2, 0.25, 0.08][:count]
    y = weighted_sum(given, weights, dtype=dtype, backend="triton")
    want = weighted_sum_ref(given, weights, dtype=dtype)
    torch.testing.assert_close(y, want, atol=1e-6, rtol=torch.finfo(dtype).eps)


def test_weighted_sum_of_equal_tensors_slices_and_out():
    x = torch.cat([randn(3000), torch.tensor([0.0, -0.0])])
    for count in (3, 7):
        y = weighted_sum([x] * count, [1 / count] * count, backend="triton")
        assert torch.equal(y.view(torch.int32), x.view(torch.int32))
    pieces = [x[1:9], x[2:10]]  # not at addresses of 16 bytes
    torch.testing.assert_close(weighted_sum(pieces, [0.5, 0.5]), (x[1:9] + x[2:10]) / 2)
    assert weighted_sum(pieces, [0.5, 0.5], out=pieces[0]) is pieces[0]
    assert weighted_sum([x[:0]], [1.0]).shape == (0,)
