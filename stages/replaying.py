"""`--replay`: one step of a run again, without its update, to see what was wrong with it.

No stage itself; `wiring.run` comes here instead of training. The run's folder gets replay/, and is
else only read. By default the weights are those the step had, to the last bit on the same ranks:
from the newest checkpoint before it, the steps in between are taken again. On fewer ranks each
computes more of the step's packs.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from wiring import Job, PackedConfig, begin, build_job

from triptych_core.checkpoint.folders import checkpoints
from triptych_core.checkpoint.load import load_checkpoint, newest_whole
from triptych_core.checkpoint.saver import Resumed, go_on_from
from triptych_core.checkpoint.together import on_main
from triptych_core.faults.loss_guard import SKIPPED
from triptych_core.launch import Runtime, shutdown
from triptych_core.lines import read_lines
from triptych_core.loop import train
from triptych_core.metrics import Metrics
from triptych_core.replay.look import Heads, LastLook, replayed_run
from triptych_core.replay.norms import by_module
from triptych_core.replay.numbers import Numbers
from triptych_core.replay.record import Recorded, read_step
from triptych_core.replay.result import (
    Document,
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


def replay(config: PackedConfig) -> None:
    """Run the step again, print what is found, and write it to run.dir/replay."""
    config, runtime, _ = begin(config)
    replay_step(config, runtime)
    shutdown()


def replay_step(config: PackedConfig, runtime: Runtime) -> None:
    """The same in a job that has begun; every rank takes part."""
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
    job = build_job(replayed_run(config, scratch), runtime)
    resumed, weights = find_weights(job, run_dir, recorded)
    seen = run_step(job, runtime, resumed, recorded.step)
    everyone: list[Any] = [None] * runtime.world_size
    dist.all_gather_object(everyone, seen)
    job.engine.destroy()
    if runtime.is_main:
        exact = config.replay.weights == "exact"
        exact &= rows == recorded.rows or resumed.step == recorded.step - 1
        result = put_together(job.config, recorded, everyone, weights, exact=exact)
        page = write_result(result, run_dir / "replay")
        shutil.rmtree(scratch)
        say([*as_lines(result), f"written to {page}"])


def find_weights(job: Job, run_dir: Path, recorded: Recorded) -> tuple[Resumed, str]:
    """Load the weights that are asked for, go to where the data are, and say whose they are.

    Steps that are still to be taken begin after the step of what is returned.
    """
    wanted, before = job.config.replay.weights, recorded.step - 1
    found: list[Path] = on_main(lambda: checkpoints(run_dir))
    earlier = [path for path in found if _step_of(path) <= before]
    if wanted == "exact":
        path = newest_whole(earlier) if earlier else None
        resumed = go_on_from(job.engine, job.config, job.batches, path) if path else Resumed()
        weights = f"of {path or job.config.model.path}"
        if resumed.step < before:
            weights += f", then steps {resumed.step + 1} to {before} again"
        return resumed, weights
    go_to(job, recorded, earlier[-1] if earlier else None)
    path = wanted if isinstance(wanted, Path) else None
    if wanted == "nearest":
        path = next(iter([*earlier[-1:], *found]), None)
    if path is not None:
        load_checkpoint(job.engine, job.config, newest_whole([_checked(path)]))
    return Resumed(before), f"of {path or job.config.model.path}, which the step did not have"


def go_to(job: Job, recorded: Recorded, checkpoint: Path | None) -> None:
    """Let the data begin where the step does: where it is noted, or as the plan has it."""
    position, step = 0, 0
    if checkpoint is not None:
        state = json.loads((checkpoint / "state.json").read_text())
        position, step = state["data"]["position"], state["step"]
    if recorded.position is not None:
        position = recorded.position
    elif passed := (recorded.step - 1 - step) * recorded.packs:
        packs = islice(job.batches.plan.packs(position), passed - 1, None)
        position = next(packs).next_position
    job.batches.position = position


def run_step(job: Job, runtime: Runtime, resumed: Resumed, step: int) -> Seen:
    """Take the steps up to `step` as the run did, and that one without its update."""
    layers, model, config = job.model.layers(), job.engine.module, job.config
    names = {id(module): name for name, module in model.named_modules()}
    numbers, stream, window = Numbers(), iter(job.batches), []
    with Metrics(
        config, rank=runtime.rank, world_size=runtime.world_size, start_step=resumed.step
    ) as metrics:
        look = LastLook(job.engine, config, metrics.note, resumed)
        look.last_step = step
        go_through = partial(
            train, job.engine, config=config, flops=job.model.flops, metrics=metrics, oversight=look
        )
        go_through(stream, part=job.part, start_step=resumed.step, last_step=step - 1)
        heads = Heads(model, job.model.hf.lm_head)
        with numbers.watched(model, layers if job.model.is_compiled else ()):
            go_through(_noting(stream, window), part=job.part, start_step=step - 1, last_step=step)
        heads.close()
    norms = {name: float(norm) for name, norm in look.norms.items()}
    return Seen(
        read_packs(job, window, heads),
        numbers.first_forward(),
        numbers.first_backward(),
        by_module(norms, [names[id(layer)] for layer in layers]),
    )


def read_packs(job: Job, window: Sequence[dict[str, Any]], heads: Heads) -> list[Pack]:
    """The loss of every document of this rank's packs; all ranks take part."""
    counts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(counts, [len(batch["sample_keys"]) for batch in window])
    found = []
    for number, batch in enumerate(window):
        owners = torch.full_like(batch["shift_labels"], -1)
        bounds = batch["cu_seqlens"].tolist()
        for document in range(len(batch["sample_keys"])):
            owners[:, bounds[document] : bounds[document + 1]] = document
        labels = job.part(batch)["shift_labels"]
        owners = job.part(batch | {"shift_labels": owners})["shift_labels"]
        # Under ZeRO-3 the head gathers its weight: as often on every rank.
        losses = [
            float(heads.loss_of(number, torch.where(owners == document, labels, -100)))
            for document in range(max(some[number] for some in counts))
        ]
        documents = [
            Document(
                key,
                job.batches.shards.where(job.batches.plan.pieces.locate(piece)[0]),
                bounds[i + 1] - bounds[i],
                int((batch["shift_labels"][:, bounds[i] : bounds[i + 1]] != -100).sum()),
                losses[i],
            )
            for i, (key, piece) in enumerate(
                zip(batch["sample_keys"], batch["sample_ids"], strict=True)
            )
        ]
        holes = [hole.message for hole in batch["holes"]]
        position = batch["place"].position
        found.append(Pack(position, float(heads.losses[number]), documents, holes))
    return found


def put_together(
    config: PackedConfig, recorded: Recorded, everyone: Sequence[Seen], weights: str, *, exact: bool
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
