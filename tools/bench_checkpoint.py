"""What a checkpoint costs: the stall of a step, what a step takes meanwhile, seconds to load.

    deepspeed --num_gpus 1 tools/bench_checkpoint.py --billions 1.7 --stage 0 --folder /tmp/bench

One JSON row: a stack of square linear layers in bf16 with AdamW's fp32 states, so 12 bytes a
parameter on the disk. `stall_ms` are those of the first save and of the next ones, longest last;
`pinning_*` what steps lost once, while memory was pinned beside them; `as_of_the_save` says that
what was loaded is what was there when the last save began, though steps went on. What a save costs
a run that saves every 100 steps is `share_of_100_steps`: its stall, and what the steps beside its
writing took longer. Steps are compared with those that ran alone; `--step-ms` says how long a step
of yours takes. On a CPU it is a rehearsal.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist
from torch import Tensor, nn

SAVES = 3


@click.command(help=__doc__)
@click.option("--billions", default=0.05, help="Parameters.")
@click.option("--width", default=2048, help="Of a layer.")
@click.option("--tokens", default=4096, help="Rows of a step.")
@click.option("--stage", default=0, type=click.IntRange(0, 3))
@click.option("--step-ms", type=float, help="Of a step that saves are counted against.")
@click.option("--folder", required=True, type=click.Path(path_type=Path), help="It is emptied.")
@click.option("--local_rank", hidden=True, default=0, help="The launcher adds it.")
def main(
    billions: float,
    width: int,
    tokens: int,
    stage: int,
    step_ms: float | None,
    folder: Path,
    local_rank: int,
) -> None:
    from triptych_core.checkpoint.host_copy import HostCopy
    from triptych_core.checkpoint.save import take_snapshot, write_snapshot
    from triptych_core.config import StageConfig, load_config
    from triptych_core.engine.masters import flats_of
    from triptych_core.launch import launch, shutdown

    words = [f"run.dir={folder}", f"engine.zero.stage={stage}", "checkpoint.keep=1"]
    config = load_config(StageConfig, None, words)
    runtime = launch(config.run)
    if runtime.is_main:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    dist.barrier()
    engine = build(config, runtime.world_size, max(1, round(billions * 1e9 / width**2)), width)
    x = torch.randn(tokens, width, device=engine.device, dtype=torch.bfloat16)
    alone = [timed(engine, lambda: step(engine, x)) for _ in range(6)][2:]

    host_copy, group = HostCopy(), dist.new_group(backend="gloo")
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    inner.register_step_pre_hook(host_copy.before_change)
    pinning = reserve(engine, host_copy, x)
    stalls, writes, meanwhile = [], [], []
    for number in range(SAVES):
        then = [flat.master.clone() for flat in flats_of(engine)]
        begin = time.perf_counter()
        snapshot = take_snapshot(engine, config, number, {}, host_copy)
        stalls.append(time.perf_counter() - begin)
        thread = Timed(lambda snapshot=snapshot: write_snapshot(snapshot, group))
        while not agree(thread.is_done()):
            meanwhile.append(timed(engine, lambda: step(engine, x)))
        writes.append(thread.seconds)
    size = sum(f.stat().st_size for f in (folder / "checkpoints").rglob("*") if f.is_file())
    check, load = reload(engine, config)
    same = all(
        torch.equal(flat.master, wanted)
        for flat, wanted in zip(flats_of(engine), then, strict=True)
    )
    if runtime.is_main:
        usual = statistics.median(alone)
        longer = sum(meanwhile) / SAVES - len(meanwhile) / SAVES * usual
        cost = statistics.median(stalls[1:]) + max(0.0, longer)
        numels = (getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
        row = {
            "parameters": sum(numels),
            "ranks": runtime.world_size,
            "stage": stage,
            "gib": size / 2**30,
            "stall_ms": [1000 * seconds for seconds in (stalls[0], *sorted(stalls[1:]))],
            "share_of_100_steps": cost / 100 / (step_ms / 1000 if step_ms else usual),
            "pinning_seconds": sum(pinning) - len(pinning) * usual,
            "pinning_step": max(pinning, default=usual) / usual,
            "as_of_the_save": same,
            "write_seconds": statistics.median(writes),
            "check_seconds": check,
            "load_seconds": load,
            "step_seconds": usual,
            "step_while_writing": statistics.median(meanwhile) / usual,
        }
        sys.stdout.write(json.dumps(row) + "\n")
    shutdown()


def build(config: Any, world_size: int, layers: int, width: int) -> Any:
    from triptych_core.engine.build import build_engine, compute_dtype, sharded_init
    from triptych_core.optim.groups import build_optimizer, parameter_groups

    with sharded_init(config.engine, world_size):
        model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    model.to(compute_dtype(config.engine))
    groups = parameter_groups(model.named_parameters(), config.optim, lambda name: "all")
    optimizer = build_optimizer(groups, config.optim)
    return build_engine(model, optimizer, config.engine, config.optim, world_size)


def reserve(engine: Any, host_copy: Any, x: Tensor) -> list[float]:
    """Seconds of the steps taken while room is pinned."""
    from triptych_core.checkpoint.fragments import stretches_to_save

    size = sum(stretch.num_bytes for stretch in stretches_to_save(engine)[0])
    thread = host_copy.reserve(size)
    steps = []
    while not agree(not thread.is_alive()):
        steps.append(timed(engine, lambda: step(engine, x)))
    return steps


def step(engine: Any, x: Tensor) -> None:
    engine.backward(engine(input=x).float().square().mean(), scale_wrt_gas=False)
    engine.step()


def timed(engine: Any, function: Any) -> float:
    from deepspeed.accelerator import get_accelerator

    begin = time.perf_counter()
    function()
    get_accelerator().synchronize()
    return time.perf_counter() - begin


def agree(is_done: bool) -> bool:
    """Whether all ranks are done, so that all take the same number of steps."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, is_done)
    return all(found)


def reload(engine: Any, config: Any) -> tuple[float, float]:
    """Seconds to find the newest whole checkpoint, and to load it."""
    from triptych_core.checkpoint.folders import checkpoints
    from triptych_core.checkpoint.load import load_checkpoint, newest_whole

    begin = time.perf_counter()
    path = newest_whole(checkpoints(config.run.dir))
    middle = time.perf_counter()
    load_checkpoint(engine, config, path)
    return middle - begin, time.perf_counter() - middle


class Timed:
    """A function on a thread, and how long it took."""

    def __init__(self, function: Any) -> None:
        from concurrent.futures import ThreadPoolExecutor

        self.seconds = 0.0
        self._future = ThreadPoolExecutor(1).submit(self._run, function)

    def is_done(self) -> bool:
        """Whether it has come to an end; raises what it raised."""
        return self._future.done() and self._future.result() is None

    def _run(self, function: Any) -> None:
        begin = time.perf_counter()
        function()
        self.seconds = time.perf_counter() - begin


if __name__ == "__main__":
    main()
