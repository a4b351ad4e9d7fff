"""AdamW of core: torch's numbers, other gradients, working copies, bf16 states, loading."""

import copy

import pytest
import torch
from torch import nn

from triptych_core.config import OptimConfig
from triptych_core.optim.adamw import AdamW
from triptych_core.optim.groups import build_optimizer
from triptych_core.optim.muon import Muon
from triptych_core.optim.shards import Matrix, Piece, Shard

OPTIONS = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8}
SHAPES = [(8, 6), (6,), (1, 5)]


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def groups(params):
    """Two, with a rate and a decay of their own."""
    first = {"params": params[:1], "weight_decay": 0.1, "name": "all/decay"}
    return [first, {"params": params[1:], "weight_decay": 0.0, "lr": 1e-3, "name": "all/no_decay"}]


def gradients(step, params):
    generator = torch.Generator().manual_seed(100 + step)
    return {p: torch.randn(p.shape, generator=generator) for p in params}


def run(optimizer, params, steps, **options):
    for step in steps:
        optimizer.step(gradients=gradients(step, params), **options)
    return [p.detach().clone() for p in params]


def test_to_the_last_digit_torch_adamw():
    ours, theirs = parameters(), parameters()
    mine = AdamW(groups(ours), **OPTIONS)
    torchs = torch.optim.AdamW(groups(theirs), fused=True, **OPTIONS)
    for step in range(1, 6):
        for p, q, g in zip(ours, theirs, gradients(step, ours).values(), strict=True):
            p.grad, q.grad = g.clone(), g.clone()
        if step == 3:
            ours[1].grad = theirs[1].grad = None  # passed over: its count stays behind
        mine.step()
        torchs.step()
        assert all(map(torch.equal, ours, theirs)), step
    for p, q in zip(ours, theirs, strict=True):
        assert mine.state[p]["step"] == int(torchs.state[q]["step"])
        assert type(mine.state[p]["step"]) is int
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(mine.state[p][name], torchs.state[q][name])


def test_states_of_torch_adamw_are_taken_and_given():
    theirs, ours = parameters(), parameters()
    torchs, mine = torch.optim.AdamW(groups(theirs), fused=True, **OPTIONS), AdamW(groups(ours))
    for p, g in zip(theirs, gradients(1, theirs).values(), strict=True):
        p.grad = g
    torchs.step()
    for p, q in zip(ours, theirs, strict=True):
        p.data.copy_(q.data)
    mine.load_state_dict(copy.deepcopy(torchs.state_dict()))
    for p, q, g in zip(ours, theirs, gradients(2, theirs).values(), strict=True):
        p.grad, q.grad = g, g.clone()
    torchs.step()
    mine.step()
    assert all(map(torch.equal, ours, theirs))
    again = torch.optim.AdamW(groups(parameters()), fused=True)
    again.load_state_dict(mine.state_dict())
    assert all(int(held["step"]) == 2 for held in again.state.values())


def test_given_gradients_come_before_own_and_are_scaled():
    ours, wanted = parameters(), parameters()
    given = {p: g.bfloat16() for p, g in gradients(1, ours).items()}
    last = ours[-1]
    last.grad = given.pop(last).float()
    ours[0].grad = torch.full_like(ours[0], 7.0)  # not looked at
    AdamW(groups(ours), **OPTIONS).step(gradients=given, grad_scale=torch.tensor(0.25))
    for p, g in zip(wanted, gradients(1, wanted).values(), strict=True):
        p.grad = g.bfloat16().float() * 0.25
    torch.optim.AdamW(groups(wanted), fused=True, **OPTIONS).step()
    assert all(map(torch.equal, ours, wanted))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_working_copies_are_the_masters_rounded(name):
    masters = parameters()
    config = OptimConfig(name=name, lr=0.1)
    muon = {"rule": "muon", "momentum": 0.9, "nesterov": True, "lr_scale": "original"}
    kinds = [{"params": masters[:1], "matrices": [[(8, 6)]], **muon}, {"params": masters[1:]}]
    optimizer = build_optimizer(kinds if name == "muon" else groups(masters), config)
    copies = {p: p.detach().bfloat16() for p in masters[:2]}  # the last has none
    optimizer.attach(copies)
    if isinstance(optimizer, Muon):
        whole = Matrix((8, 6), (Piece(0, 0, 48, 0),))
        optimizer.place([Shard(masters[0], (whole,), None)])
    before = [p.detach().clone() for p in masters]
    run(optimizer, masters, [1, 2], grad_scale=torch.tensor(0.5))
    assert not any(map(torch.equal, before, masters))
    assert all(torch.equal(low, p.bfloat16()) for p, low in copies.items())


def test_muon_scales_wide_copies_of_low_gradients():
    def updated(**options):
        (master, *_) = parameters()
        muon = {"rule": "muon", "momentum": 0.9, "nesterov": True, "lr_scale": "original"}
        group = {"params": [master], "matrices": [[(8, 6)]], "weight_decay": 0.1, **muon}
        # As it is, so that the size of the gradient shows.
        optimizer = build_optimizer([group], OptimConfig(name="muon"), orthogonalise=lambda x, _: x)
        whole = Matrix((8, 6), (Piece(0, 0, 48, 0),))
        optimizer.place([Shard(master, (whole,), None)])
        gradient = gradients(1, [master])[master]
        gradient = options.pop("of", lambda g: g)(gradient)
        kept = gradient.clone()
        optimizer.step(gradients={master: gradient}, **options)
        return master, torch.equal(gradient, kept)

    scaled, untouched = updated(of=torch.Tensor.bfloat16, grad_scale=torch.tensor(0.5))
    assert untouched
    wanted, _ = updated(of=lambda g: g.bfloat16().float() * 0.5)
    assert torch.equal(scaled, wanted)


def test_bf16_states_follow_fp32_and_a_loaded_run_repeats_every_bit():
    def optimizer(params, **options):
        return AdamW(groups(params), **OPTIONS, state_dtype="bf16", **options)

    params, exact = parameters(), parameters()
    whole = optimizer(params, seed=3)
    run(whole, params, range(1, 4))
    run(AdamW(groups(exact), **OPTIONS), exact, range(1, 4))
    assert all(held["exp_avg_sq"].dtype == torch.bfloat16 for held in whole.state.values())
    moved = torch.cat([(p - q).view(-1) for p, q in zip(exact, parameters(), strict=True)]).norm()
    apart = torch.cat([(p - q).view(-1) for p, q in zip(exact, params, strict=True)]).norm()
    assert 0 < apart < 0.02 * moved

    halfway, saved = [p.detach().clone() for p in params], copy.deepcopy(whole.state_dict())
    wanted = run(whole, params, range(4, 7))
    for seed, same in ((3, True), (4, False)):
        again = [nn.Parameter(p.clone()) for p in halfway]
        resumed = optimizer(again, seed=seed)
        resumed.load_state_dict(copy.deepcopy(saved))
        run(resumed, again, range(4, 7))
        assert all(map(torch.equal, again, wanted)) == same


def test_groups_and_steps_round_by_numbers_of_their_own():
    params = [nn.Parameter(torch.zeros(64, 64)) for _ in range(2)]
    kinds = [{"params": [p], "name": name} for p, name in zip(params, "ab", strict=True)]
    optimizer = AdamW(kinds, state_dtype="bf16")
    same = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    optimizer.step(gradients=dict.fromkeys(params, same))
    first, second = (optimizer.state[p]["exp_avg"] for p in params)
    assert not torch.equal(first, second)


def test_a_closure_is_called_with_gradients_on_and_its_loss_returned():
    (p, *_) = parameters()
    optimizer = AdamW([p])

    def closure():
        loss = p.square().sum()
        loss.backward()
        return loss

    before = p.detach().clone()
    assert optimizer.step(closure) == before.square().sum()
    assert not torch.equal(p, before)
