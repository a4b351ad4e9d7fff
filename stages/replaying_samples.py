"""`--replay` where batches are samples: the loss of every one.

No stage itself; `main` of stages on latents and images comes here instead of training.
"""

from collections.abc import Callable, Sequence
from typing import Any

from replaying import Kind, replay_step
from running import Trainee

from triptych_core.launch import Runtime, shutdown
from triptych_core.replay.look import Losses
from triptych_core.replay.result import Document, Pack


def replay(
    config: Any,
    runtime: Runtime,
    build: Callable[[Any, Runtime], Trainee],
    loop: Callable[[Any], dict[str, Any]],
) -> None:
    """Run the step again, print what is found, and write it to run.dir/replay.

    build: as for training. loop: of a job, what `train` is told of this kind of batches.
    """
    replay_step(config, runtime, kind_of(build, loop))
    shutdown()


def kind_of(
    build: Callable[[Any, Runtime], Trainee], loop: Callable[[Any], dict[str, Any]]
) -> Kind:
    """Of a stage's batches."""

    def told(job: Any) -> dict[str, Any]:
        return loop(job) | {"unit": "images"}

    return Kind(build, batches_end, lambda job: Losses(job.engine.module), read_batches, told)


def batches_end(job: Any, position: int, packs: int) -> int:
    """Where so many batches from a position end: all are full."""
    return position + packs * int(job.batches.batches.batch_size)


def read_batches(job: Any, window: Sequence[dict[str, Any]], losses: Losses) -> list[Pack]:
    """The loss of every sample that is in this rank's batches."""
    found = []
    for batch, total, each in zip(window, losses.sums, losses.each, strict=True):
        there = batch["weights"].nonzero().flatten().tolist()  # rows
        targets = batch["num_targets"] // max(batch["num_tokens"], 1)
        named = zip(there, batch["sample_keys"], batch["sample_ids"], strict=True)
        samples = [
            Document(key, job.batches.where(number), 1, targets, float(each[row]))
            for row, key, number in named
        ]
        holes = [hole.message for hole in batch["holes"]]
        found.append(Pack(batch["place"].position, float(total), samples, holes))
    return found
