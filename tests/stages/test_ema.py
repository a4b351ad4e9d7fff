"""Averages of weights: their closed form, steps left out, and what is evaluated and exported."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ranks import run_ranks
from tests.stages.test_checkpoint import Stream, build, join
from tests.stages.test_muon import STEPS, config_of, packs
from tests.tiny import whole_masters

STEPS_TAKEN, DECAY = 20, 0.8
LAYOUTS = [
    (0, "fp32", "adamw", False),
    (0, "bf16", "muon", False),
    (1, "bf16", "adamw", True),
    (1, "fp32", "muon", False),
    (2, "bf16", "muon", False),
    (3, "fp32", "muon", True),
    (3, "bf16", "adamw", False),
    (3, "bf16", "offload", False),  # DeepSpeed's own step
]


class Endless(Stream):
    """The packs again and again."""

    def __next__(self) -> dict[str, Any]:
        batch = packs()[(self._position + self._rank) % (STEPS * 4)]
        self._position += self._world_size
        return batch


def masters(engine: Any) -> dict[str, Tensor]:
    """Whole, in fp64."""
    return {name: master.double() for name, master in whole_masters(engine).items()}


def weights(engine: Any) -> dict[str, Tensor]:
    found = {}
    for name, parameter in engine.module.named_parameters():
        with engine.gather([parameter]):
            found[name] = parameter.detach().clone()
    return found


def averages(path: Path) -> Iterator[dict[str, Any]]:
    """Of each layout: all masters, then what averaged_weights showed and left behind."""
    import torch.distributed as dist

    from triptych_core.engine.averaged import averaged_weights
    from triptych_core.loop import train
    from triptych_core.metrics import Metrics

    rank, world_size = join()
    for number, (stage, precision, optimizer, warmup) in enumerate(LAYOUTS):
        config = config_of(
            path / str(number),
            f"run.steps={STEPS_TAKEN}",
            f"engine.zero.stage={stage}",
            f"engine.precision={precision}",
            f"optim.name={'muon' if optimizer == 'muon' else 'adamw'}",
            f"engine.zero.offload_optimizer={str(optimizer == 'offload').lower()}",
            f"optim.ema_decay={DECAY}",
            f"optim.ema_warmup={str(warmup).lower()}",
            "checkpoint.save=false",
        )
        if rank == 0:
            config.run.dir.mkdir()
        dist.barrier()
        engine = build(config, seed=0)
        seen = [masters(engine)]
        with averaged_weights(engine):  # before the first step there are none
            assert all(torch.equal(m, seen[0][name]) for name, m in masters(engine).items())
        with Metrics(config, rank=rank, world_size=world_size) as metrics:
            train(
                engine,
                Endless(rank, world_size),
                config,
                flops=lambda batch: 0.0,
                metrics=metrics,
                on_step=[lambda step, seen=seen, engine=engine: seen.append(masters(engine))],
            )
        before = weights(engine)
        with averaged_weights(engine):
            average, shown = masters(engine), weights(engine)
        yield {"seen": seen, "average": average, "shown": shown} | {
            "restored": all(torch.equal(m, seen[-1][n]) for n, m in masters(engine).items()),
            "unharmed": all(torch.equal(w, before[n]) for n, w in weights(engine).items()),
        }
        engine.destroy()


def all_averages(path: Path) -> list[dict[str, Any]]:
    return list(averages(path))


def closed_form(seen: list[Tensor], warmup: bool) -> Tensor:
    """Sum over t of (1 - d_t) d_(t+1) ... d_T w_t, and d_1 ... d_T w_0, in fp64."""
    decays = [min(DECAY, (1 + t) / (10 + t)) if warmup else DECAY for t in range(len(seen) - 1)]
    shares = [1.0, *(1 - decay for decay in decays)]
    for t, decay in enumerate(decays):
        shares[: t + 1] = [share * decay for share in shares[: t + 1]]
    assert sum(shares) == pytest.approx(1)
    return sum(share * weight for share, weight in zip(shares, seen, strict=True))


def test_an_average_is_its_closed_form_of_the_weights_that_were(tmp_path):
    for results in run_ranks(all_averages, 2, tmp_path):
        for (*layout, warmup), found in zip(LAYOUTS, results, strict=True):
            assert found["restored"] and found["unharmed"], layout
            for name, average in found["average"].items():
                wanted = closed_form([masters[name] for masters in found["seen"]], warmup)
                error = (average - wanted).norm() / wanted.norm()
                assert error <= 1e-6, f"{layout}: {name} off by {error:.1e}"
                moved = (average - found["seen"][-1][name]).norm() / average.norm()
                assert moved > 1e-4, f"{layout}: {name} is not an average"
                weight = found["shown"][name]
                assert torch.equal(weight, average.to(weight.dtype)), f"{layout}: {name}"


def test_a_step_left_out_leaves_the_average():
    from triptych_core.optim.adamw import AdamW
    from triptych_core.optim.ema import AVERAGE, Ema

    master = torch.nn.Parameter(torch.randn(7))
    optimizer = AdamW([{"params": [master]}], lr=0.1, ema=Ema(0.9))
    state = optimizer.state
    for scale in (1.0, float("nan"), 1.0):
        before = master.detach().clone(), state[master].get(AVERAGE, master).detach().clone()
        optimizer.step(gradients={master: torch.randn(7)}, grad_scale=torch.tensor(scale))
        average = state[master][AVERAGE]
        if scale == 1.0:
            assert torch.allclose(average, before[1] + 0.1 * (master - before[1]))
            assert not torch.equal(average, before[1])
        else:
            assert torch.equal(master, before[0]) and torch.equal(average, before[1])


class Ops(TorchDispatchMode):
    """Counts what would be launched."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("scale", [None, 0.5])
def test_many_averages_follow_in_one_launch(scale: float | None):
    from triptych_core.optim.ema import AVERAGE, Ema

    counts, ema = [], Ema(0.9, warmup=True)
    for many in (1, 50):
        masters = [torch.randn(3, 5) for _ in range(many)]
        states: dict[Tensor, Any] = {master: {} for master in masters}
        ema.begin(states, masters)
        began = [master.clone() for master in masters]
        for master in masters:
            master.add_(1.0)
        found = None if scale is None else torch.tensor(scale)
        with Ops() as ops:
            ema.follow(states, masters, found)
        counts.append(ops.count)
        for master, before in zip(masters, began, strict=True):
            wanted = before.lerp(master, 1 - ema.decay_at(0))
            torch.testing.assert_close(states[master][AVERAGE], wanted)
    assert counts[0] == counts[1] <= 7
