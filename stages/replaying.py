"""`--replay`: one step of a run again, without its update, to see what was wrong with it.

No stage itself; stages come here instead of training, by way of `replaying_rows` where batches are
packed rows and of `replaying_samples` where they are samples. The run's folder gets replay/, and is
else only read. By default the weights are those the step had, to the last bit on the same ranks:
from the newest checkpoint before it, the steps in between are taken again. On fewer ranks each
computes more of the step's packs.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from running import Trainee

from triptych_core.checkpoint.folders import checkpoints
from triptych_core.checkpoint.load import load_checkpoint, newest_whole
from triptych_core.checkpoint.saver import Resumed, go_on_from
from triptych_core.checkpoint.together import on_main
from triptych_core.config import StageConfig
from triptych_core.faults.loss_guard import SKIPPED
from triptych_core.launch import Runtime
from triptych_core.lines import read_lines
from triptych_core.loop import train
from triptych_core.metrics import Metrics
from triptych_core.replay.look import LastLook, replayed_run
from triptych_core.replay.norms import by_module
from triptych_core.replay.numbers import Numbers
from triptych_core.replay.record import Recorded, read_step
from triptych_core.replay.result import (
    Pack,
    Replayed,
    as_lines,
    loss_as_in_run,
    merge_packs,
    rank_samples,
    write_result,
)
from triptych_core.verify.checks import say


class Seen(NamedTuple):
    """What a rank saw of the step."""

    packs: list[Pack]
    forward: str | None
    backward: str | None
    norms: dict[str, float]


@dataclass(frozen=True)
class Kind:
    """What is known of one kind of batches.

    build: a rank's share of the run, not begun. after: where so many packs from a position end.
    watch: sees the losses of a job's forwards until it is closed. read: of a job, its window and
    what was watched, the loss of each document or sample; all ranks take part. loop: of a job, what
    `train` and `Metrics` are told.
    """

    build: Callable[[Any, Runtime], Trainee]
    after: Callable[[Any, int, int], int]
    watch: Callable[[Any], Any]
    read: Callable[[Any, Sequence[dict[str, Any]], Any], list[Pack]]
    loop: Callable[[Any], dict[str, Any]]


def replay_step(config: Any, runtime: Runtime, kind: Kind) -> None:
    """Run the step again, print what is found, and write it to run.dir/replay; every rank takes
    part, in a job that has begun."""
    run_dir, rows = config.run.dir, runtime.world_size // config.parallel.ranks_per_row
    recorded: Recorded = on_main(partial(read_step, run_dir, config.replay.step))
    if recorded.packs % rows:
        raise ValueError(
            f"replay: ranks must divide the {recorded.packs} packs of a step, got {rows}; start "
            "as many as the run had, or one"
        )
    config.engine.gradient_accumulation_steps = recorded.packs // rows
    scratch = run_dir / "replay/unfinished"
    if runtime.is_main:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    dist.barrier()
    short = replayed_run(config, scratch)
    job = kind.build(short, runtime)
    resumed, weights = find_weights(job, short, run_dir, recorded, kind)
    seen = run_step(job, short, runtime, resumed, recorded.step, kind)
    everyone: list[Any] = [None] * runtime.world_size
    dist.all_gather_object(everyone, seen)
    job.engine.destroy()
    if runtime.is_main:
        exact = config.replay.weights == "exact"
        exact &= rows == recorded.rows or resumed.step == recorded.step - 1
        result = put_together(short, recorded, everyone, weights, exact=exact)
        page = write_result(result, run_dir / "replay")
        shutil.rmtree(scratch)
        say([*as_lines(result), f"written to {page}"])


def find_weights(
    job: Trainee, config: Any, run_dir: Path, recorded: Recorded, kind: Kind
) -> tuple[Resumed, str]:
    """Load the weights that are asked for, go to where the data are, and say whose they are.

    Steps that are still to be taken begin after the step of what is returned.
    """
    wanted, before = config.replay.weights, recorded.step - 1
    first = config.model.path or "model.init=random"
    found: list[Path] = on_main(lambda: checkpoints(run_dir))
    earlier = [path for path in found if _step_of(path) <= before]
    if wanted == "exact":
        path = newest_whole(earlier) if earlier else None
        resumed = go_on_from(job.engine, config, job.batches, path) if path else Resumed()
        weights = f"of {path or first}"
        if resumed.step < before:
            weights += f", then steps {resumed.step + 1} to {before} again"
        return resumed, weights
    go_to(job, recorded, earlier[-1] if earlier else None, kind)
    path = wanted if isinstance(wanted, Path) else None
    if wanted == "nearest":
        path = next(iter([*earlier[-1:], *found]), None)
    if path is not None:
        load_checkpoint(job.engine, config, newest_whole([_checked(path)]))
    return Resumed(before), f"of {path or first}, which the step did not have"


def go_to(job: Trainee, recorded: Recorded, checkpoint: Path | None, kind: Kind) -> None:
    """Let the data begin where the step does: where it is noted, or as the plan has it."""
    position, step = 0, 0
    if checkpoint is not None:
        state = json.loads((checkpoint / "state.json").read_text())
        position, step = state["data"]["position"], state["step"]
    if recorded.position is not None:
        position = recorded.position
    elif passed := (recorded.step - 1 - step) * recorded.packs:
        position = kind.after(job, position, passed)
    job.batches.position = position


def run_step(
    job: Trainee, config: Any, runtime: Runtime, resumed: Resumed, step: int, kind: Kind
) -> Seen:
    """Take the steps up to `step` as the run did, and that one without its update."""
    layers, model, loop = job.model.layers(), job.engine.module, kind.loop(job)
    names = {id(module): name for name, module in model.named_modules()}
    numbers, stream, window = Numbers(), iter(job.batches), []
    unit = loop.pop("unit", "tokens")
    ranks = {"rank": runtime.rank, "world_size": runtime.world_size}
    with Metrics(config, **ranks, start_step=resumed.step, unit=unit) as metrics:
        look = LastLook(job.engine, config, metrics.note, resumed)
        look.last_step = step
        go_through = partial(
            train,
            job.engine,
            config=config,
            flops=job.model.flops,
            metrics=metrics,
            oversight=look,
            part=job.part,
            **loop,
        )
        go_through(stream, start_step=resumed.step, last_step=step - 1)
        losses = kind.watch(job)
        with numbers.watched(model, layers if config.model.compile == "layers" else ()):
            go_through(_noting(stream, window), start_step=step - 1, last_step=step)
        losses.close()
    norms = {name: float(norm) for name, norm in look.norms.items()}
    return Seen(
        kind.read(job, window, losses),
        numbers.first_forward(),
        numbers.first_backward(),
        by_module(norms, [names[id(layer)] for layer in layers]),
    )


def put_together(
    config: StageConfig, recorded: Recorded, everyone: Sequence[Seen], weights: str, *, exact: bool
) -> Replayed:
    """What all ranks saw; config is that of the replay's own short run."""
    packs = merge_packs([p for seen in everyone for p in seen.packs], config.parallel.tensor)
    step = next(
        s for s in read_lines(config.run.dir / "metrics.jsonl") if s["step"] == recorded.step
    )
    skipped = {line["step"]: line["why"] for line in read_lines(config.run.dir / SKIPPED)}
    loss = step["loss"]
    if len(packs) // config.engine.gradient_accumulation_steps != recorded.rows:
        loss = loss_as_in_run(packs, recorded.rows, step["num_targets"])
    return Replayed(
        step=recorded.step,
        weights=weights,
        is_exact=exact,
        loss=loss,
        grad_norm=step["grad_norm"],
        verdict=skipped.get(recorded.step),
        recorded=recorded,
        forward={rank: seen.forward for rank, seen in enumerate(everyone) if seen.forward},
        backward={rank: seen.backward for rank, seen in enumerate(everyone) if seen.backward},
        modules=everyone[0].norms,
        samples=rank_samples(packs),
        holes=[hole for pack in packs for hole in pack.holes],
    )


def _noting(stream: Iterator[dict[str, Any]], window: list[Any]) -> Iterator[dict[str, Any]]:
    for batch in stream:
        window.append(batch)
        yield batch


def _checked(path: Path) -> Path:
    if not (path / "state.json").is_file():
        raise ValueError(
            f"replay.weights: must be exact, nearest, model or a checkpoint's folder, got {path}; "
            "name one of run.dir/checkpoints"
        )
    return path


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
