"""AdamW: to the last digit torch's where torch has it, near float64 elsewhere, unbiased in bf16."""

import pytest
import torch

from triptych_kernels import adamw_, adamw_ref
from triptych_kernels.adamw import round_stochastically

OPTIONS = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
SHAPES = [(7, 5), (1,), (0, 3), (64, 33)]


def randn(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def zeros(like, dtype=torch.float32):
    return [torch.zeros(x.shape, dtype=dtype) for x in like]


def gradients(step, dtype=torch.float32):
    return [randn(shape, 100 * step + i).to(dtype) for i, shape in enumerate(SHAPES)]


def test_in_float32_it_is_torch_adamw_to_the_last_digit():
    ours = [randn(shape) for shape in SHAPES]
    theirs = [x.clone().requires_grad_() for x in ours]
    betas = (OPTIONS["beta1"], OPTIONS["beta2"])
    rest = {k: OPTIONS[k] for k in ("lr", "eps", "weight_decay")}
    optimizer = torch.optim.AdamW(theirs, betas=betas, fused=True, **rest)
    states = zeros(ours), zeros(ours)
    for step in range(1, 6):
        grads = gradients(step)
        adamw_(ours, grads, *states, step=step, **OPTIONS)
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g
        optimizer.step()
        assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_copies_scale_and_half_gradients(backend, grad_dtype):
    ours = [randn(shape) for shape in SHAPES]
    wide = [x.double() for x in ours]
    copies = [None, *(torch.zeros_like(x, dtype=torch.bfloat16) for x in ours[1:])]
    states, wide_states = (zeros(ours), zeros(ours)), ([x * 0 for x in wide], [x * 0 for x in wide])
    scale = torch.tensor(0.3)
    for step in range(1, 4):
        grads = gradients(step, grad_dtype)
        kept = [g.clone() for g in grads]
        more = {"grad_scale": scale, **OPTIONS}
        adamw_(ours, grads, *states, copies=copies, step=step, backend=backend, **more)
        adamw_ref(wide, kept, *wide_states, step=step, **more)
        assert all(map(torch.equal, grads, kept))  # they are the caller's
    for x, y in zip(ours, wide, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-6, atol=1e-7)
    assert all(c is None or torch.equal(c, x.bfloat16()) for c, x in zip(copies, ours, strict=True))


@pytest.mark.parametrize("scale", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_scale_that_is_not_finite_changes_nothing(backend, scale):
    params = [randn(shape) for shape in SHAPES]
    states = [randn(x.shape, 1) for x in params], [randn(x.shape, 2).abs() for x in params]
    before = [x.clone() for x in (*params, *states[0], *states[1])]
    more = {"grad_scale": torch.tensor(scale), "backend": backend, **OPTIONS}
    adamw_(params, gradients(1), *states, step=1, **more)
    assert all(map(torch.equal, (*params, *states[0], *states[1]), before))


def test_the_reference_works_piece_by_piece(monkeypatch):
    whole, pieces = [randn((64, 33))], [randn((64, 33))]
    grads = [randn((64, 33), 1)]
    adamw_ref(whole, grads, zeros(whole), zeros(whole), step=1, **OPTIONS)
    monkeypatch.setattr("triptych_kernels.adamw._PIECE", 100)
    adamw_ref(pieces, grads, zeros(pieces), zeros(pieces), step=1, **OPTIONS)
    assert torch.equal(whole[0], pieces[0])


def test_stochastic_rounding_is_unbiased_and_goes_to_a_neighbour():
    generator = torch.Generator().manual_seed(3)
    x = torch.tensor([1.0, 1.001, -3.3, 1e-20, 7.0039])
    draws = torch.stack([round_stochastically(x, generator) for _ in range(4000)]).double()
    step = 2.0 ** (torch.frexp(x).exponent - 8).double()
    assert ((draws - x.double()).abs() < step).all()
    error = (draws.mean(0) - x.double()).abs() / step
    assert error.max() < 4 * 0.5 / 4000**0.5
    assert (draws[:, 0] == 1).all()  # what bfloat16 can hold stays
    edges = torch.tensor([torch.inf, -torch.inf, torch.nan])
    kept = round_stochastically(edges, generator)
    assert torch.equal(kept[:2].float(), edges[:2]) and kept[2].isnan()


def test_half_states_follow_float32_within_their_noise():
    """200 steps: no drift, although v's every step is far below half a digit of bfloat16."""
    options = {**OPTIONS, "beta2": 0.999, "weight_decay": 0.0}
    runs = {}
    for dtype in (torch.float32, torch.bfloat16):
        param, states = (
            [randn((64, 64))],
            (zeros([randn((64, 64))], dtype), zeros([randn((64, 64))], dtype)),
        )
        for step in range(1, 201):
            grad = [param[0] + 0.5 * randn((64, 64), 1000 + step)]
            adamw_(param, grad, *states, step=step, seed=step, **options)
        runs[dtype] = param[0], *(state[0].float() for state in states)
    (p, _, v), (p_half, _, v_half) = runs[torch.float32], runs[torch.bfloat16]
    moved = (p - randn((64, 64))).norm()
    assert (p - p_half).norm() < 0.02 * moved
    assert (v_half / v - 1).mean().abs() < 2e-3
    assert (v_half / v - 1).abs().max() < 0.2


def test_the_same_seed_gives_the_same_bits_and_another_others():
    def states(seed):
        param = [randn((40, 40))]
        found = zeros(param, torch.bfloat16), zeros(param, torch.bfloat16)
        adamw_(param, [randn((40, 40), 1)], *found, step=1, seed=seed, **OPTIONS)
        return found[0][0]

    assert torch.equal(states(5), states(5))
    assert not torch.equal(states(5), states(6))


def test_what_does_not_fit_is_named():
    x, half = torch.zeros(4), torch.zeros(4, dtype=torch.bfloat16)
    for lists, message in (
        (([half], [x], [x], [x]), r"params\[0\] must be .*float32"),
        (([x, x], [x, x[:3]], [x, x], [x, x]), r"grads\[1\] must be of 4 elements"),
        (([x], [x], [half], [x]), r"exp_avg_sqs\[0\] must be .*bfloat16.*got.*float32"),
        (([torch.zeros(4, 2).T], [x], [x], [x]), r"params\[0\] must be contiguous"),
        (([x, x], [x], [x], [x]), "the same length"),
    ):
        with pytest.raises(ValueError, match=message):
            adamw_(*lists, step=1, **OPTIONS)
    with pytest.raises(ValueError, match="step must be at least 1"):
        adamw_([x], [x], [x], [x], step=0, **OPTIONS)
    with pytest.raises(ValueError, match="no bfloat16 states"):
        adamw_([x], [x], [half], [half], step=1, backend="torch", **OPTIONS)
    with pytest.raises(ValueError, match=r"grad_scale must be one float32.*float64"):
        adamw_(
            [x], [x], [x], [x], step=1, grad_scale=torch.ones((), dtype=torch.float64), **OPTIONS
        )
    adamw_([], [], [], [], step=1, **OPTIONS)
