"""AdamW's Triton code on the CPU; run by test_interpreted.py.

Its bfloat16 is bits and shifts, so that the interpreter computes it right.
"""

import pytest
import torch

from triptych_kernels import adamw_, adamw_ref
from triptych_kernels.triton_ops import adamw as kernels

OPTIONS = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
SHAPES = [(7, 5), (1,), (0, 3), (64,), (130,)]
HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(kernels, "_BLOCK", 64)
    kernels._chunks.cache_clear()
    yield
    kernels._chunks.cache_clear()


def randn(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def unaligned(x):
    """The same values, two bytes or four past an address that is a multiple of 16."""
    out = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)
    return out.copy_(x)


@pytest.mark.parametrize("place", [lambda x: x, unaligned], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("grad_dtype", [torch.float32, HALF])
@pytest.mark.parametrize("scaled", [False, True])
def test_equals_float64(place, grad_dtype, scaled):
    params = [place(randn(shape)) for shape in SHAPES]
    wide = [p.double() for p in params]
    states = [[place(torch.zeros(s)) for s in SHAPES] for _ in range(2)]
    wide_states = [[x.double() for x in state] for state in states]
    copies = [None, *(place(torch.zeros(s, dtype=HALF)) for s in SHAPES[1:])]
    more = {**OPTIONS, "grad_scale": torch.tensor(0.3) if scaled else None}
    for step in (1, 2):
        grads = [place(randn(s, step * 10 + i).to(grad_dtype)) for i, s in enumerate(SHAPES)]
        adamw_(params, grads, *states, copies=copies, step=step, backend="triton", **more)
        adamw_ref(wide, grads, *wide_states, step=step, **more)
    want = [*wide, *wide_states[0], *wide_states[1]]
    for p, w in zip([*params, *states[0], *states[1]], want, strict=True):
        torch.testing.assert_close(p.double(), w, rtol=2e-6, atol=1e-7)
    for copy, p in zip(copies[1:], params[1:], strict=True):
        assert torch.equal(copy, p.bfloat16())


@pytest.mark.parametrize("scale", [torch.nan, torch.inf])
def test_a_scale_that_is_not_finite_changes_nothing(scale):
    tensors = [[randn(s, i) for s in SHAPES] for i in range(3)]
    before = [[x.clone() for x in row] for row in tensors]
    more = {**OPTIONS, "grad_scale": torch.tensor(scale)}
    adamw_(tensors[0], before[0], *tensors[1:], step=1, backend="triton", **more)
    for row, kept in zip(tensors, before, strict=True):
        assert all(map(torch.equal, row, kept))


def test_gradients_of_both_dtypes_in_one_call():
    params, wide = ([randn(s) for s in SHAPES] for _ in range(2))
    grads = [randn(s, i).to((torch.float32, HALF)[i % 2]) for i, s in enumerate(SHAPES)]
    for tensors, op in ((params, adamw_), (wide, adamw_ref)):
        states = [[torch.zeros(s) for s in SHAPES] for _ in range(2)]
        op(tensors, grads, *states, step=1, **OPTIONS)
    for p, w in zip(params, wide, strict=True):
        torch.testing.assert_close(p, w, rtol=2e-6, atol=1e-7)


def test_half_states_go_to_a_neighbour_and_are_unbiased():
    value = 1.0 + 2.0**-9  # between 1 and 1 + 2^-7, a quarter of the way
    count = 6_000
    grad = torch.full((count,), value)
    drawn = []
    for seed in (1, 2):
        states = [[torch.zeros(count, dtype=HALF)] for _ in range(2)]
        options = {**OPTIONS, "beta1": 0.0, "beta2": 0.0}
        adamw_([torch.zeros(count)], [grad], *states, step=1, seed=seed, **options)
        drawn.append([state[0].float() for state in states])
    (m, v), (other, _) = drawn
    assert set(m.tolist()) == {1.0, 1 + 2.0**-7}
    shares = [float((x > 1).float().mean()) for x in (m, other)]
    assert all(abs(share - 0.25) < 4 * (0.25 * 0.75 / count) ** 0.5 for share in shares)
    assert not torch.equal(m, other)
    exact = value * value
    assert abs(float(v.double().mean()) - exact) < 4 * 2.0**-8 / count**0.5
    # m and v, neighbours, and blocks draw independently of each other.
    up = [(x > x.min()).double() - (x > x.min()).double().mean() for x in (m, v)]
    for a, b in ((up[0], up[1]), (up[0][:-1], up[0][1:]), (up[0][:-64], up[0][64:])):
        assert abs(float((a * b).mean())) < 5 * 0.25 / count**0.5


def test_special_values():
    all_ones = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)  # a GPU's NaN
    grad = torch.tensor([torch.inf, 0.0, 1e-30, 0.0])
    grad[1] = all_ones
    params = [torch.ones(4)]
    copies = [torch.zeros(4, dtype=HALF)]
    states = [[torch.zeros(4, dtype=HALF)] for _ in range(2)]
    adamw_(params, [grad], *states, copies=copies, step=1, **OPTIONS)
    assert states[0][0][1].isnan() and states[1][0][1].isnan() and copies[0][1].isnan()
    assert states[0][0][0].isinf()
    assert params[0][3] == 1 - 3e-3 * 0.1


def test_copies_are_rounded_to_even():
    ties = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, -1 - 2.0**-8])
    copies, states = [torch.zeros(3, dtype=HALF)], [[torch.zeros(3)] for _ in range(2)]
    still = {**OPTIONS, "weight_decay": 0.0}
    adamw_([ties.clone()], [torch.zeros(3)], *states, copies=copies, step=1, **still)
    assert torch.equal(copies[0], ties.bfloat16())
    assert copies[0].tolist() == [1, 1 + 2.0**-6, -1]
