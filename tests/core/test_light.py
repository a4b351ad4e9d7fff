"""The engine for ZeRO-0 to 2, and what it shares with ZeRO-3: sums of gradients, steps left out."""

from __future__ import annotations

from itertools import product
from typing import Any

import deepspeed  # noqa: F401  once, and not on every rank
import pytest
import torch
from torch import Tensor, nn

from tests.ranks import run_ranks
from triptych_core.config import StageConfig, load_config

WIDTH = 6


class Net(nn.Module):
    """`late` gets a gradient in every micro-step but the last, `never` in none."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.late, self.never = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.tied = self.first.weight

    def forward(self, x: Tensor, with_late: bool) -> Tensor:
        x = torch.tanh(self.first(x)) @ self.tied
        return (self.late(x) if with_late else x).square().sum()


def make_net() -> Net:
    net = Net()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return net


def rows(rank: int, micro_step: int) -> Tensor:
    seed = 10 * rank + micro_step
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(seed))


def build(net: Net, *words: str) -> Any:
    import torch.distributed as dist

    from triptych_core.engine.build import build_engine
    from triptych_core.launch import launch
    from triptych_core.optim.groups import build_optimizer, parameter_groups

    config = load_config(StageConfig, None, ["run.device=cpu", "optim.lr=1e-2", *words])
    launch(config.run)
    matrices = {name: [(WIDTH, WIDTH)] for name, p in net.named_parameters() if p.dim() == 2}
    groups = parameter_groups(net.named_parameters(), config.optim, lambda name: "net", matrices)
    optimizer = build_optimizer(groups, config.optim)
    return build_engine(net, optimizer, config.engine, config.optim, dist.get_world_size())


def sums(micro_steps: int, bucket: int, stage: int) -> dict[str, Tensor]:
    import torch.distributed as dist

    from triptych_core.engine import gradient_sums

    gradient_sums.GradientSums.__init__.__defaults__ = (bucket,)
    net = make_net()
    engine = build(
        net,
        f"engine.zero.stage={stage}",
        f"engine.zero.bucket_size={bucket}",
        "engine.precision=fp32",
        f"engine.gradient_accumulation_steps={micro_steps}",
    )
    for micro_step in range(micro_steps):
        loss = engine(x=rows(dist.get_rank(), micro_step), with_late=micro_step < micro_steps - 1)
        engine.backward(loss)
        if micro_step < micro_steps - 1:
            engine.step()
    gradients = engine.gradients()
    engine.destroy()
    return {name: gradients[p].clone() for name, p in net.named_parameters()}


WAYS = list(product((0, 1, 2), (1, 40, 10**6)))


def sums_in_all_ways(micro_steps: int) -> list[dict[str, Tensor]]:
    return [sums(micro_steps, bucket, stage) for stage, bucket in WAYS]


@pytest.mark.parametrize(("world_size", "micro_steps"), [(1, 2), (2, 1), (2, 3)])
def test_sums_over_ranks_and_micro_steps(world_size, micro_steps):
    net = make_net().double()
    for rank in range(world_size):
        for micro_step in range(micro_steps):
            loss = net(rows(rank, micro_step).double(), micro_step < micro_steps - 1)
            (loss / world_size).backward()
    for result in run_ranks(sums_in_all_ways, world_size, micro_steps):
        for way, found in zip(WAYS, result, strict=True):
            for name, parameter in net.named_parameters():
                wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                where = f"stage {way[0]}, buckets of {way[1]}: {name}"
                apart = found[name].double() - wanted
                assert apart.abs().max() <= 1e-6 + 1e-5 * wanted.abs().max(), where


def steps_with_one_overflow(words: list[str]) -> tuple[list[dict[str, Tensor]], list[float]]:
    """Masters after each of three steps, the second with an infinite gradient; and norms."""
    from triptych_core.engine.masters import flats_of

    net = make_net()
    engine = build(net, *words)
    found, norms = [], []
    for factor in (1.0, torch.inf, 1.0):
        engine.backward(engine(x=rows(0, 0).to(net.first.weight.dtype), with_late=True) * factor)
        engine.step()
        norms.append(float(engine.get_global_grad_norm()))
        masters = [flat.master for flat in flats_of(engine)]
        states = engine.optimizer.optimizer.state if hasattr(engine.optimizer, "optimizer") else {}
        states = states or engine.optimizer.state
        found.append(
            {
                f"{index}/{name}": value.clone()
                for index, master in enumerate(masters)
                for name, value in {"master": master.data, **states[master]}.items()
                if isinstance(value, Tensor)
            }
        )
    engine.destroy()
    return found, norms


def moved_by_set(stage: int, most: float) -> dict[str, float]:
    """How far a step moves two parts that are clipped each for itself, over its rate."""
    from triptych_core.engine.build import build_engine
    from triptych_core.optim.groups import build_optimizer, parameter_groups

    # With eps so large a step is as long as the gradient.
    words = ["run.device=cpu", "engine.precision=fp32", "optim.lr=100", "optim.eps=1e4"]
    words += ["optim.weight_decay=0", f"engine.zero.stage={stage}", f"optim.max_grad_norm={most}"]
    config, net = load_config(StageConfig, None, words), make_net()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    named = net.named_parameters()
    groups = parameter_groups(named, config.optim, lambda name: name.partition(".")[0])
    for group in groups:
        if group["name"].startswith("late/"):
            group["clip"] = "late"
    optimizer = build_optimizer(groups, config.optim)
    engine = build_engine(net, optimizer, config.engine, config.optim, 1)
    engine.backward(engine(x=rows(0, 0), with_late=True))
    engine.step()
    squares: dict[str, float] = {}
    for name, p in net.named_parameters():
        part = "late" if name.startswith("late") else "first"
        moved = float((p.detach() - before[name]).square().sum())
        squares[part] = squares.get(part, 0.0) + moved
    norm = float(engine.get_global_grad_norm())
    engine.destroy()
    return {part: square**0.5 * 1e4 / 100 for part, square in squares.items()} | {"norm": norm}


def moved_in_all_ways(stages: list[int]) -> list[Any]:
    from triptych_core.config import RunConfig
    from triptych_core.launch import launch

    launch(RunConfig(device="cpu"))
    return [[moved_by_set(stage, most) for most in (0, 20)] for stage in stages]


def test_sets_of_groups_are_clipped_each_by_its_own_norm():
    for free, clipped in run_ranks(moved_in_all_ways, 1, [0, 2, 3])[0]:
        norms = free["first"], free["late"]
        assert min(norms) > 30
        assert free["norm"] == pytest.approx(sum(n**2 for n in norms) ** 0.5, rel=0.01)
        assert clipped["norm"] == pytest.approx(free["norm"], rel=1e-5)  # before clipping
        assert clipped["first"] == pytest.approx(20, rel=0.01)
        assert clipped["late"] == pytest.approx(20, rel=0.01)


CASES = list(product((0, 1, 2, 3), ("adamw", "muon"), (0, 0.1)))


def all_steps() -> list[Any]:
    names = ("engine.zero.stage", "optim.name", "optim.max_grad_norm")
    return [
        steps_with_one_overflow([f"{n}={v}" for n, v in zip(names, case, strict=True)])
        for case in CASES
    ]


@pytest.fixture(scope="module")
def steps() -> dict[tuple[Any, ...], Any]:
    return dict(zip(CASES, run_ranks(all_steps, 1)[0], strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_whose_gradients_overflow_is_left_out(steps, case):
    found, norms = steps[case]
    before, after, later = found
    assert not torch.isfinite(torch.tensor(norms[1]))
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
        assert torch.isfinite(later[name]).all()
    assert any(not torch.equal(after[name], later[name]) for name in after)
