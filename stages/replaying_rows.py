"""`--replay` where batches are packed rows: the loss of every document.

No stage itself; `wiring.run` comes here instead of training.
"""

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from planning import PackedConfig, begin
from replaying import Kind, replay_step
from wiring import Job, build_job

from triptych_core.launch import shutdown
from triptych_core.replay.look import Heads
from triptych_core.replay.result import Document, Pack


def replay(config: PackedConfig) -> None:
    """Run the step again, print what is found, and write it to run.dir/replay."""
    config, runtime, _ = begin(config)
    replay_step(config, runtime, ROWS)
    shutdown()


def packs_end(job: Job, position: int, packs: int) -> int:
    """Where so many packs from a position of the plan end."""
    return next(islice(job.batches.plan.packs(position), packs - 1, None)).next_position


def watch(job: Job) -> Heads:
    """What the head is given from now on."""
    return Heads(job.engine.module, job.model.hf.lm_head)


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


ROWS = Kind(build_job, packs_end, watch, read_packs, lambda job: {})
