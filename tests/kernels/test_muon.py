import copy

import pytest
import torch

from triptych_kernels import Muon, muon, newton_schulz

SHAPES = [(8, 20), (20, 8), (8, 20), (12, 12)]


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def give_gradients(params, step):
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


def run(optimizer, params, steps=3):
    for step in range(steps):
        give_gradients(params, step)
        optimizer.step()
    return [p.detach() for p in params]


def plain_muon(params, steps, *, lr, weight_decay, momentum, nesterov, scale, **options):
    """The update rule, one parameter after the other."""
    buffers = [torch.zeros_like(p) for p in params]
    for step in range(steps):
        give_gradients(params, step)
        for p, buffer in zip(params, buffers, strict=True):
            buffer.copy_(momentum * buffer + (1 - momentum) * p.grad)
            update = (1 - momentum) * p.grad + momentum * buffer if nesterov else buffer
            step_size = lr * scale(*p.shape)
            p.data = (1 - lr * weight_decay) * p - step_size * newton_schulz(update, **options)
    return [p.detach() for p in params]


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(
    ("adjust_lr", "scale"),
    [
        ("original", lambda m, n: max(1, m / n) ** 0.5),
        ("match_rms_adamw", lambda m, n: 0.2 * max(m, n) ** 0.5),
    ],
)
def test_matches_the_plain_rule(adjust_lr, scale, nesterov):
    options = {"compute_dtype": torch.float32}
    shared = {"lr": 0.05, "weight_decay": 0.2, "momentum": 0.9, "nesterov": nesterov}
    params = parameters()
    ours = run(Muon(params, adjust_lr=adjust_lr, **shared, **options), params)
    want = plain_muon(parameters(), 3, scale=scale, **shared, **options)
    for got, plain in zip(ours, want, strict=True):
        torch.testing.assert_close(got, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("adjust_lr", ["original", "match_rms_adamw"])
def test_matches_torch_with_its_coefficients(adjust_lr):
    params, theirs = parameters(), parameters()
    ours = Muon(params, 0.05, coefficients="quintic", form="standard", adjust_lr=adjust_lr)
    want = run(torch.optim.Muon(theirs, 0.05, adjust_lr_fn=adjust_lr), theirs)
    for start, got, plain in zip(parameters(), run(ours, params), want, strict=True):
        # Both iterate in bfloat16; torch takes the norm in it too.
        assert (got - plain).norm() < 0.02 * (plain - start).norm()


def test_batches_do_not_change_the_result(monkeypatch):
    params, others = parameters(), parameters()
    together = run(Muon(params, compute_dtype=torch.float32), params)
    monkeypatch.setattr(muon, "_BATCH_ELEMENTS", 1)
    alone = run(Muon(others, compute_dtype=torch.float32), others)
    for got, want in zip(together, alone, strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


def test_parameters_of_one_shape_are_one_call(monkeypatch):
    shapes = []

    def count(g, *args, **options):
        shapes.append(tuple(g.shape))
        return newton_schulz(g, *args, **options)

    monkeypatch.setattr(muon, "newton_schulz", count)
    params = parameters()
    run(Muon(params), params, steps=1)
    assert shapes == [(2, 8, 20), (1, 20, 8), (1, 12, 12)]


def test_adamw_groups_are_torch_adamw():
    params, theirs = parameters(), parameters()
    bias, other = (torch.nn.Parameter(torch.ones(7)) for _ in range(2))
    options = {"lr": 0.02, "weight_decay": 0.3, "betas": (0.8, 0.9), "eps": 1e-6}
    ours = Muon([{"params": params[:2]}, {"params": [*params[2:], bias], "use_muon": False}])
    ours.param_groups[1].update(options)
    want = run(torch.optim.AdamW([*theirs[2:], other], **options), [*theirs, other])
    got = run(ours, [*params, bias])
    assert all(map(torch.equal, got[2:], want[2:]))
    assert not torch.equal(got[0], want[0])


def test_state_dict_round_trip_is_exact():
    def build():
        params = [*parameters(), torch.nn.Parameter(torch.ones(5))]
        groups = [{"params": params[:3]}, {"params": params[3:], "use_muon": False}]
        return params, Muon(groups, lr=0.03)

    params, optimizer = build()
    run(optimizer, params, steps=2)
    others, resumed = build()
    for p, other in zip(params, others, strict=True):
        other.data.copy_(p.data)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    assert all(map(torch.equal, run(resumed, others), run(optimizer, params)))


def test_stacks_of_matrices():
    stack = torch.nn.Parameter(torch.stack([p.detach() for p in parameters()[::2]]))
    single = parameters()[::2]
    stack.grad = torch.randn(stack.shape, generator=torch.Generator().manual_seed(0))
    for p, grad in zip(single, stack.grad, strict=True):
        p.grad = grad.clone()
    Muon([{"params": [stack], "stacked": True}]).step()
    Muon(single).step()
    assert torch.equal(stack, torch.stack([p.detach() for p in single]))


def test_bfloat16_parameters_and_missing_gradients():
    p = torch.nn.Parameter(torch.ones(4, 6, dtype=torch.bfloat16))
    idle = torch.nn.Parameter(torch.ones(4, 6))
    optimizer = Muon([p, idle], lr=0.1)
    p.grad = torch.randn_like(p)
    assert optimizer.step(lambda: 3.5) == 3.5
    assert torch.equal(idle, torch.ones(4, 6)) and not torch.equal(p, torch.ones_like(p))
    assert optimizer.state[p]["momentum_buffer"].dtype == torch.bfloat16


def test_learns():
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(10, 32), torch.nn.Tanh(), torch.nn.Linear(32, 3))
    matrices = [p for p in layers.parameters() if p.dim() == 2]
    rest = [p for p in layers.parameters() if p.dim() != 2]
    optimizer = Muon([{"params": matrices}, {"params": rest, "use_muon": False}], lr=0.02)
    x = torch.randn(64, 10)
    target = torch.tanh(x @ torch.randn(10, 3))
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append((layers(x) - target).square().mean())
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.1 * losses[0]


def test_what_is_not_a_matrix_is_refused():
    bias = torch.nn.Parameter(torch.ones(7))
    with pytest.raises(ValueError, match=r"param_groups\[0\]\.params\[1\]: .*got \(7,\).*use_muon"):
        Muon([parameters()[0], bias])
    with pytest.raises(ValueError, match=r"params\[0\] \(head\.bias\)"):
        Muon([("head.bias", bias)])
    stack = torch.nn.Parameter(torch.ones(2, 3, 4))
    with pytest.raises(ValueError, match="stacked=True"):
        Muon([stack])
    optimizer = Muon(parameters())
    with pytest.raises(ValueError, match=r"param_groups\[1\]"):
        optimizer.add_param_group({"params": [bias]})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [bias], "use_muon": False})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("lr", -1.0),
        ("weight_decay", -0.1),
        ("momentum", 1.0),
        ("adjust_lr", "rms"),
        ("steps", 0),
        ("coefficients", "cubic"),
        ("form", "tall"),
    ],
)
def test_values_out_of_range_are_refused(option, value):
    with pytest.raises(ValueError, match=rf"param_groups\[0\]\.{option}"):
        Muon(parameters(), **{option: value})
    if option in ("lr", "weight_decay"):
        with pytest.raises(ValueError, match=rf"param_groups\[0\]\.{option}"):
            Muon(parameters(), use_muon=False, **{option: value})


def test_betas_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"param_groups\[0\]\.betas"):
        Muon(parameters(), use_muon=False, betas=(0.9, 1.0))
