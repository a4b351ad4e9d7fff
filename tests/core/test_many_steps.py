"""What one step does not show: updates below a bit of bf16 add up; a module may run twice.

Losses are linear in the weights, so that every gradient is known beforehand, and exact in bf16: the
fp64 reference needs no weights, and errors of forward and backward cannot hide those of updates.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.ranks import run_ranks
from triptych_core.config import StageConfig, load_config

SIZE, LR = 256, 1e-4
STEPS = {0: 1000, 2: 1000, 3: 200}  # by stage; a step of DeepSpeed's costs several of ours
WALKS = [(0, "fp32"), (0, "bf16"), (2, "fp32"), (3, "fp32")]  # stage, dtype of states


def build(net: nn.Module, *words: str) -> Any:
    import torch.distributed as dist

    from triptych_core.engine.build import build_engine, compute_dtype, sharded_init
    from triptych_core.launch import launch
    from triptych_core.optim.groups import build_optimizer, parameter_groups

    config = load_config(StageConfig, None, ["run.device=cpu", "optim.max_grad_norm=0", *words])
    launch(config.run)
    with sharded_init(config.engine, dist.get_world_size()):
        net = net.to(compute_dtype(config.engine))
    groups = parameter_groups(net.named_parameters(), config.optim, lambda name: "net")
    optimizer = build_optimizer(groups, config.optim)
    return build_engine(net, optimizer, config.engine, config.optim, dist.get_world_size())


class Line(nn.Module):
    """Weights, and losses that are linear in them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(start())

    def forward(self, slope: Tensor) -> Tensor:
        return (self.weight * slope).sum()


def start() -> Tensor:
    """Weights of 0.5 to 2: a bit of bf16 there is 0.004 to 0.008, an update 0.0001."""
    return torch.linspace(0.5, 2, SIZE).bfloat16().float()


def slope(rank: int, step: int) -> Tensor:
    """Of a step's loss, exact in bf16, most often of one sign: weights wander off."""
    generator = torch.Generator().manual_seed(2 * step + rank)
    signs = torch.where(torch.arange(SIZE) % 2 == 0, 1.0, -1.0)
    return (signs + torch.randn(SIZE, generator=generator)).bfloat16().float()


def walk(stage: int, states: str) -> dict[str, Tensor]:
    """Master and weight after many steps in bf16."""
    import torch.distributed as dist

    from tests.tiny import whole_masters
    from triptych_core.engine.cut_weights import whole_weights

    words = [f"engine.zero.stage={stage}", f"optim.lr={LR}", f"optim.state_dtype={states}"]
    engine = build(Line(), *words, "optim.weight_decay=0", "engine.precision=bf16")
    for step in range(STEPS[stage]):
        engine.backward(engine(slope=slope(dist.get_rank(), step).bfloat16()))
        engine.step()
    with whole_weights(engine.module.parameters()):
        weight = engine.module.weight.detach().clone()
    master = whole_masters(engine)["weight"]
    engine.destroy()
    return {"master": master, "weight": weight}


def all_walks() -> list[dict[str, Tensor]]:
    return [walk(*way) for way in WALKS]


@pytest.fixture(scope="module")
def walks() -> dict[tuple[int, str], list[dict[str, Tensor]]]:
    """By stage and dtype of states, on each rank."""
    return dict(zip(WALKS, zip(*run_ranks(all_walks, 2), strict=True), strict=True))


@pytest.fixture(scope="module")
def wanted() -> dict[int, Tensor]:
    """By stage, weights after its steps in fp64."""
    weight = start().double().requires_grad_()
    adamw = torch.optim.AdamW([weight], lr=LR, betas=(0.9, 0.95), eps=1e-8, weight_decay=0)
    found = {}
    for step in range(max(STEPS.values())):
        weight.grad = (slope(0, step).double() + slope(1, step).double()) / 2
        adamw.step()
        found |= {s: weight.detach().clone() for s, steps in STEPS.items() if steps == step + 1}
    return found


@pytest.mark.parametrize(("stage", "states"), WALKS)
def test_updates_below_a_bit_of_bf16_add_up(walks, wanted, stage, states):
    moved = (wanted[stage] - start()).abs().min()
    assert moved > 0.008  # each of them: bits of bf16, in steps of a fortieth of one
    for found in walks[stage, states]:
        apart = (found["master"].double() - wanted[stage]).abs().max()
        assert found["master"].dtype == torch.float32
        assert apart < (1e-4 if states == "fp32" else 5e-2) * moved
        assert torch.equal(found["weight"], found["master"].bfloat16())


class Twice(nn.Module):
    """`block` runs twice in a forward, `head` once on each of its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = nn.Linear(6, 6), nn.Linear(6, 1)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        once = torch.tanh(self.block(x))
        return (self.head(once) * self.head(torch.tanh(self.block(once)))).sum()


def row(rank: int, micro_step: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * rank + micro_step)
    return torch.randn(3, 6, generator=generator)


def run_twice() -> list[dict[str, Tensor]]:
    """Whole gradients of two micro-steps at every stage."""
    import torch.distributed as dist

    from tests.tiny import whole_gradients

    found = []
    for stage in range(4):
        words = [f"engine.zero.stage={stage}", "engine.precision=fp32"]
        engine = build(Twice(), *words, "engine.gradient_accumulation_steps=2")
        engine.backward(engine(x=row(dist.get_rank(), 0)), scale_wrt_gas=False)
        engine.step()
        engine.backward(engine(x=row(dist.get_rank(), 1)), scale_wrt_gas=False)
        found.append({name: g.clone() for name, g in whole_gradients(engine).items()})
        engine.destroy()
    return found


def test_a_module_that_runs_twice_gets_the_gradients_of_both():
    net = Twice().double()
    for rank, micro_step in product(range(2), range(2)):
        (net(row(rank, micro_step).double()) / 2).backward()
    for by_stage in run_ranks(run_twice, 2):
        for stage, found in enumerate(by_stage):
            for name, parameter in net.named_parameters():
                error = (found[name].double() - parameter.grad).norm() / parameter.grad.norm()
                assert error < 1e-5, f"stage {stage}: {name} off by {error:.1e}"
