"""The plan of ZeRO-1 and 2 against every byte of gradients that their engine holds on the way."""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import deepspeed  # noqa: F401  once, and not on every rank
import pytest
import torch
from torch import nn

from tests.ranks import run_ranks
from tests.tiny import storages

WIDTHS = (40, 200, 24, 300, 16, 60)
CASES = [
    (stage, accumulation, precision, reduce, bucket)
    for stage, accumulation, (precision, reduce), bucket in product(
        (1, 2), (1, 3), (("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16")), (1, 7000, 10**9)
    )
    # Its sums are cast as they are sent, which cannot be seen from outside.
    if (stage, accumulation > 1, reduce) != (1, True, "bf16")
]


class Chain(nn.Sequential):
    """Gradients come about in the reverse of the order of weights, exactly."""

    def __init__(self) -> None:
        pairs = pairwise(WIDTHS)
        super().__init__(*(nn.Linear(m, n) for m, n in pairs))


def most_bytes(stage: int, accumulation: int, *settings: Any) -> tuple[int, int]:
    """Of gradients during a step: what was held, and what was planned."""
    import torch.distributed as dist

    from triptych_core.config import StageConfig, load_config
    from triptych_core.engine.build import build_engine, compute_dtype
    from triptych_core.optim.groups import build_optimizer, parameter_groups
    from triptych_core.plan.divided import gradient_bytes
    from triptych_core.plan.plan import weights_of

    names = ("precision", "reduce_dtype", "zero.bucket_size")
    words = [f"engine.{name}={value}" for name, value in zip(names, settings, strict=True)]
    words += [f"engine.zero.stage={stage}", f"engine.gradient_accumulation_steps={accumulation}"]
    config = load_config(StageConfig, None, words)
    model = Chain().to(compute_dtype(config.engine))
    groups = parameter_groups(model.named_parameters(), config.optim, lambda _: "all")
    weights = weights_of(model, groups, 0, config.optim)
    ranks = dist.get_world_size()
    optimizer = build_optimizer(groups, config.optim)
    engine = build_engine(model, optimizer, config.engine, config.optim, ranks)
    seen = watch(engine._held)
    x = torch.ones(1, WIDTHS[0], dtype=compute_dtype(config.engine))
    for _ in range(accumulation):
        engine.backward(engine(input=x).sum())
        engine.step()
    engine.destroy()
    groups = [(group.sizes, ranks) for group in weights.groups]
    planned = gradient_bytes(groups, config.engine, stage=stage)
    assert planned[-1][0] == weights.numel
    return max(seen), planned[-1][1]


def watch(held: Any) -> list[int]:
    """Bytes of gradients after each gradient that came, and with each bucket on its way."""
    seen: list[int] = []

    def look(*_: Any) -> None:
        sums = [bucket.sums for bucket in held._buckets if bucket.sums is not None]
        own = [bucket.gradient for bucket in held._buckets if bucket.gradient is not None]
        flying = [tensor for flight in held._in_flight for tensor in (flight.sent, flight.part)]
        seen.append(sum(storages([*sums, *own, *flying]).values()))

    def look_then(call: Any) -> Any:
        return lambda: (look(), call())

    held._send_next, held._land = look_then(held._send_next), look_then(held._land)
    for parameter in held._bucket_of:
        parameter.register_post_accumulate_grad_hook(look)
    return seen


def all_cases() -> list[tuple[int, int]]:
    from triptych_core.config import RunConfig
    from triptych_core.launch import launch

    launch(RunConfig(device="cpu"))
    return [most_bytes(*case) for case in CASES]


@pytest.mark.parametrize("world_size", [1, 2])
def test_gradients_on_the_way_take_what_was_planned(world_size):
    for result in run_ranks(all_cases, world_size):
        for case, (held, planned) in zip(CASES, result, strict=True):
            assert held == planned, case
