"""ZeRO-3's weights: whole when they are used, and no more of them than the plan says."""

from __future__ import annotations

from collections import Counter
from typing import Any

import deepspeed  # noqa: F401  once, and not on every rank
import torch
from torch import nn

from tests.ranks import run_ranks

WIDTH, LAYERS = 24, 5


class Net(nn.Module):
    """Two weights and a bias in each layer, one weight before them and one after."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, WIDTH)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH + i), nn.GELU(), nn.Linear(WIDTH + i, WIDTH))
            for i in range(LAYERS)
        )
        self.last = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.last(x)


def build(max_live: int, frozen: int = 0) -> tuple[Any, Any]:
    """An engine, and its plan: elements that are whole at a time, and received in a step."""
    from triptych_core.config import StageConfig, load_config
    from triptych_core.engine.build import build_engine, gather_parameters, sharded_init
    from triptych_core.optim.groups import build_optimizer, parameter_groups
    from triptych_core.plan.divided import buckets_of, gathered_elements
    from triptych_core.plan.memory import received
    from triptych_core.plan.plan import weights_of

    words = ["engine.zero.stage=3", f"engine.zero.max_live={max_live}", "engine.precision=fp32"]
    words += ["engine.zero.persistence_threshold=100", "engine.zero.bucket_size=150"]
    config = load_config(StageConfig, None, words)
    torch.manual_seed(torch.distributed.get_rank())  # the first rank's draws are what counts
    with sharded_init(config.engine, 2):
        model = Net()
    for layer in [model.first, *model.layers][: frozen + bool(frozen)]:
        layer.requires_grad_(False)
    groups = parameter_groups(model.named_parameters(), config.optim, lambda _: "all")
    weights = weights_of(model, groups, 100, config.optim, model.layers)
    cuts = [(group.sizes, 2) for group in [*weights.groups, *weights.frozen]]
    planned = (
        gathered_elements(buckets_of(cuts, 150, weights.layers), max_live),
        received(weights, config.engine, 2),
    )
    with gather_parameters(config.engine)([model.layers[1][0].weight]):
        pass
    optimizer = build_optimizer(groups, config.optim)
    return build_engine(model, optimizer, config.engine, config.optim, 2, model.layers), planned


def all_cuts(engine: Any) -> list[Any]:
    held = engine._held
    return [bucket.weights for bucket in held._buckets] + held._frozen


def step(max_live: int, frozen: int) -> dict[str, Any]:
    """What is whole during a step, and how often it was gathered."""
    import torch.distributed as dist

    engine, planned = build(max_live, frozen)
    cuts, seen = all_cuts(engine), []
    before = [p.untyped_storage().nbytes() for p in engine.module.parameters()]

    def look(*_: Any) -> None:
        seen.append(sum(each.whole.untyped_storage().nbytes() // 4 for each in cuts))

    for layer in engine.module.layers:
        layer.register_forward_pre_hook(look)
    for parameter in engine.module.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(look)
    calls: Counter[str] = Counter()
    gather = dist.all_gather_into_tensor

    def count(whole: Any, own: Any, *args: Any, **kwargs: Any) -> Any:
        calls["gathers"] += 1
        calls["received"] += whole.numel() - own.numel()
        return gather(whole, own, *args, **kwargs)

    dist.all_gather_into_tensor = count
    try:
        engine.backward(engine(x=torch.ones(2, 8)).square().sum())
    finally:
        dist.all_gather_into_tensor = gather
    after = sum(p.untyped_storage().nbytes() for p in engine.module.parameters())
    engine.step()
    engine.destroy()
    outside = len(engine._held._gathering._outside)
    return {
        **{"most": max(seen), "planned": planned, "gathers": calls["gathers"] - outside},
        **{"received": calls["received"], "before": sum(before), "after": after},
    }


def all_steps() -> list[dict[str, Any]]:
    from triptych_core.config import RunConfig
    from triptych_core.launch import launch

    launch(RunConfig(device="cpu"))
    return [step(*case) for case in CASES]


# max_live and how many layers are frozen, with all before them -> gathers of layers in a step. The
# last layer stays whole; frozen ones have no backward.
CASES = {(1, 0): 2 * LAYERS - 1, (10**9, 0): LAYERS, (1, 2): 2 * LAYERS - 1 - 2}


def test_layers_are_whole_two_at_a_time_or_as_many_as_may_be():
    for results in run_ranks(all_steps, 2):
        for (case, gathers), found in zip(CASES.items(), results, strict=True):
            assert found["before"] == found["after"] == 0, case
            assert (found["most"], found["received"]) == found["planned"] > (0, 0), case
            assert found["gathers"] == gathers, case


def edits() -> list[float]:
    from triptych_core.config import RunConfig, StageConfig, load_config
    from triptych_core.engine.build import read_parameters
    from triptych_core.launch import launch

    launch(RunConfig(device="cpu"))
    engine, _ = build(1)
    config = load_config(StageConfig, None, ["engine.zero.stage=3"])
    with read_parameters(config.engine)(list(engine.module.parameters())):
        return [float(p.double().sum()) for p in engine.module.parameters()]


def test_all_ranks_begin_with_what_the_first_has():
    one, two = run_ranks(edits, 2)
    assert one == two and len(set(one)) == len(one)
