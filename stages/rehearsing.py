"""`--verify` of stages whose batches are samples: what may be wrong, before the long run.

No stage itself; their `main` comes here instead of training. Built three times, as configured: to
compare samples and take six steps; to go on after the third of them from the checkpoint; and to
take the first step with every rank computing the samples of all. A checkpoint of the run itself is
neither read nor touched.
"""

import gc
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from running import Trainee

from triptych_core.checkpoint.saver import Saver, resume
from triptych_core.checkpoint.together import on_main
from triptych_core.config import StageConfig
from triptych_core.launch import Runtime, shutdown
from triptych_core.loop import to_device, train
from triptych_core.metrics import Metrics
from triptych_core.run import device_name
from triptych_core.verify.checks import (
    ROUNDING,
    Check,
    as_table,
    compare_layouts,
    compare_rehearsals,
    cut_run,
    dump,
    judged,
    largest,
    say,
    short_run,
    timed,
)
from triptych_core.verify.page import draw_page

Stage = TypeVar("Stage", bound=StageConfig)
Build = Callable[[Stage, Runtime], Trainee]
Loop = Callable[[Any], dict[str, Any]]


def verify(config: Stage, runtime: Runtime, build: Build[Stage], loop: Loop) -> None:
    """Check, write run.dir/verify.html and verify.json, and exit with 1 if something is wrong.

    build: as for training. loop: of a job, what `train` is told of this kind of batches.
    """
    folder = config.run.dir / "verify"
    if runtime.is_main:
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "whole").mkdir(parents=True)
    dist.barrier()
    checks = []
    for check in (check_samples, rehearse_resume, check_ranks):
        gc.collect()  # or two engines would be there at once
        get_accelerator().empty_cache()
        checks.append(timed(partial(check, config, runtime, folder, build, loop)))
    if runtime.is_main:
        shutil.rmtree(folder)
        page = config.run.dir / "verify.html"
        page.write_text(draw_page(checks, _facts(config, runtime), ""), "utf-8")
        (config.run.dir / "verify.json").write_text(dump(checks))
        say([*as_table(checks), f"written to {page}"])
    shutdown()
    if any(check.status == "fail" for check in checks):
        sys.exit(1)


def check_samples(
    config: Stage, runtime: Runtime, folder: Path, build: Build[Stage], loop: Loop
) -> Check:
    """A sample's loss is the same whatever else is in its batch; then six steps are taken."""
    config = short_run(config, folder / "whole")
    job = build(config, runtime)
    batch = to_device(next(iter(job.batches)), job.engine.device)
    job.batches.position = 0
    errors, figures = [], []
    job.engine.eval()
    with torch.no_grad():
        for row in range(min(config.verify.rows, len(batch["weights"]))):
            within, alone = (
                float(job.engine(**_only(batch, row, repeat=repeat)).loss_sum)
                for repeat in (False, True)
            )
            errors.append(_worst(abs(within - alone) / max(abs(alone), 1e-30)))
            figures.append((f"sample {row}", f"loss {within:.7g} and {alone:.7g} alone"))
    job.engine.train()
    take_steps(config, job, runtime, loop)
    name = "A sample is the same whatever else is in its batch"
    limit = ROUNDING[config.engine.precision]
    return judged(name, largest(errors), limit, "losses off by", figures=figures)


def rehearse_resume(
    config: Stage, runtime: Runtime, folder: Path, build: Build[Stage], loop: Loop
) -> Check:
    """Go on from the checkpoint of a run that went through, in an engine built anew."""
    if runtime.is_main:
        cut_run(folder / "whole", folder / "cut")
    dist.barrier()
    config = short_run(config, folder / "cut")
    take_steps(config, build(config, runtime), runtime, loop)
    check: Check = on_main(partial(compare_rehearsals, folder / "whole", folder / "cut"))
    return check


def check_ranks(
    config: Stage, runtime: Runtime, folder: Path, build: Build[Stage], loop: Loop
) -> Check:
    """The first step, with every rank computing the samples of all of them."""
    name = "The ranks together take the step of one rank"
    window = runtime.world_size * config.engine.gradient_accumulation_steps
    if runtime.world_size == 1:
        return Check(name, "skipped", "there is one")
    if window > config.verify.max_window or config.engine.zero.offloads:
        found = f"a step has {window} batches, verify.max_window is {config.verify.max_window}"
        return Check(name, "skipped", "of our own engine" if config.engine.zero.offloads else found)
    together = short_run(config, folder / "together", gradient_accumulation_steps=window)
    together.checkpoint.save = False
    together.run.steps = 1
    if runtime.is_main:
        together.run.dir.mkdir()
    job = build(together, replace(runtime, rank=0, world_size=1))  # of data
    take_steps(together, job, runtime, loop)
    runs = folder / "whole", folder / "together"
    check: Check = on_main(partial(compare_layouts, *runs, config.engine.precision))
    return check


def take_steps(config: StageConfig, job: Trainee, runtime: Runtime, loop: Loop) -> None:
    """Train a short run to its end, from its checkpoint if it has one, and let go of the engine."""
    start = resume(job.engine, config, job.batches).step
    ranks = {"rank": runtime.rank, "world_size": runtime.world_size}
    with Metrics(config, **ranks, start_step=start, unit="images") as metrics:
        train(
            job.engine,
            iter(job.batches),
            config,
            flops=job.model.flops,
            metrics=metrics,
            part=job.part,
            start_step=start,
            on_step=[Saver(job.engine, config, job.batches, metrics)],
            **loop(job),
        )
    destroy = getattr(job.engine, "destroy", None)
    if destroy is not None:
        destroy()
    dist.barrier()


def _only(batch: dict[str, Any], row: int, *, repeat: bool) -> dict[str, Any]:
    """A batch of which one sample counts: among the others, or among copies of itself."""
    count = len(batch["weights"])
    chosen = torch.zeros_like(batch["weights"])
    chosen[row] = 1

    def copies(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or len(value) != count or not repeat:
            return value
        return value[row : row + 1].expand_as(value).contiguous()

    return {name: copies(value) for name, value in batch.items()} | {"weights": chosen}


def _worst(error: float) -> float:
    """Of all ranks."""
    device = torch.device(get_accelerator().current_device_name())
    worst = torch.tensor(error, device=device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return float(worst)


def _facts(config: Any, runtime: Runtime) -> dict[str, str]:
    return {
        "data": ", ".join(map(str, config.data.shards)),
        "batches": f"{config.data.batch_size} samples",
        "ranks": f"{runtime.world_size} × {device_name()}",
        "engine": f"ZeRO-{config.engine.zero.stage}, {config.engine.precision}, "
        f"accumulation {config.engine.gradient_accumulation_steps}, "
        f"checkpointing {config.engine.checkpointing}, compile {config.model.compile}",
        "optimizer": f"{config.optim.name}, lr {config.optim.lr:g}",
    }
