"""Saving: every rank writes its share under a temporary name, the main rank makes it count."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from triptych_core.checkpoint.folders import make_room, put_in_place, retire, unfinished_folder
from triptych_core.checkpoint.fragments import stretches_to_save
from triptych_core.checkpoint.generators import dump_generators
from triptych_core.checkpoint.host_copy import HostCopy
from triptych_core.checkpoint.identity import identity
from triptych_core.checkpoint.manifest import Record, sync_directory, write_manifest, write_synced
from triptych_core.checkpoint.payload import Scalars, Stretch, write_payload
from triptych_core.checkpoint.together import on_all, on_main
from triptych_core.code import code_fingerprint, package_versions
from triptych_core.config import StageConfig
from triptych_core.secrets import masked_tree

_PACKAGES = ("triptych-core", "torch", "deepspeed")


@dataclass(frozen=True)
class Snapshot:
    """What a rank writes of a checkpoint, and what the main rank says of it."""

    folder: Path
    rank: int
    stretches: list[Stretch]
    scalars: Scalars
    generators: bytes
    state: dict[str, Any]
    keep: int
    copy: HostCopy | None = None  # that holds the stretches


def take_snapshot(
    engine: Any,
    config: StageConfig,
    step: int,
    data_state: dict[str, Any],
    host_copy: HostCopy | None = None,
    more: dict[str, Any] | None = None,
) -> Snapshot:
    """Everything that a bit-equal resume needs, as it is now; every rank takes part.

    Without a host copy it is a view, to be written before the next step. `more` goes into
    state.json.

    Raises:
        ValueError: the disk is too full.
    """
    folder = unfinished_folder(config.run.dir, step)
    stretches, scalars = stretches_to_save(engine)
    needed = sum(on_all(lambda: sum(stretch.num_bytes for stretch in stretches)))
    on_main(partial(make_room, folder, needed))
    state = {
        "step": step,
        "data": data_state,
        "world_size": dist.get_world_size(),
        "zero_stage": config.engine.stage,
        "precision": config.engine.precision,
        "versions": package_versions(_PACKAGES),
        "code": code_fingerprint(),
        "config": masked_tree(config.model_dump(mode="json")),
        **identity(engine.module, config),
        **(more or {}),
    }
    return Snapshot(
        folder,
        dist.get_rank(),
        host_copy.take(stretches) if host_copy else stretches,
        scalars,
        dump_generators(),
        state,
        config.checkpoint.keep,
        host_copy,
    )


def write_snapshot(snapshot: Snapshot, group: Any = None) -> Path:
    """Write a checkpoint, sync it and only then give it its name; every rank takes part.

    Then older ones beyond `checkpoint.keep` go.

    Args:
        snapshot: of this rank.
        group: process group of all ranks; one of its own on a thread of its own.

    Raises:
        ValueError: a rank could not write.
    """
    records: dict[str, Record] = {}
    for share in on_all(partial(write_share, snapshot), group):
        records |= share
    path: Path = on_main(partial(finish, snapshot, records), group)
    return path


def write_share(snapshot: Snapshot) -> dict[str, Record]:
    """Write and sync the files of a rank; returns their records."""
    payload = f"rank-{snapshot.rank:05d}.safetensors"
    generators = f"random-{snapshot.rank:05d}.safetensors"
    folder = snapshot.folder
    if snapshot.copy is not None:
        snapshot.copy.wait()
    return {
        payload: write_payload(folder / payload, snapshot.stretches, snapshot.scalars),
        generators: write_synced(folder / generators, snapshot.generators),
    }


def finish(snapshot: Snapshot, records: dict[str, Record]) -> Path:
    """Write what is left to the main rank, when all shares are there; returns the final path."""
    folder, step = snapshot.folder, snapshot.state["step"]
    text = json.dumps(snapshot.state, indent=2) + "\n"
    written = write_synced(folder / "state.json", text.encode())
    write_manifest(folder, {**records, "state.json": written})
    sync_directory(folder)
    path = put_in_place(folder, step)
    retire(path.parent.parent, step, snapshot.keep)
    return path
