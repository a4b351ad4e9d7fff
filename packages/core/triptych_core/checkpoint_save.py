"""Saving: every rank writes its share under a temporary name, the main rank makes it count."""

from __future__ import annotations

import json
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch.distributed as dist

from triptych_core.checkpoint_folders import make_room, put_in_place, retire, unfinished_folder
from triptych_core.config import StageConfig
from triptych_core.fragments import stretches_to_save
from triptych_core.generators import dump_generators
from triptych_core.identity import identity
from triptych_core.manifest import Record, sync_directory, write_manifest, write_synced
from triptych_core.payload import Scalars, Stretch, write_payload
from triptych_core.together import on_all, on_main

_PACKAGES = ("triptych-core", "torch", "deepspeed")


def save_checkpoint(
    engine: Any, config: StageConfig, step: int, data_state: dict[str, Any]
) -> Path:
    """Save everything a bit-equal resume needs; every rank takes part.

    Written, synced and only then given its name; then older ones beyond `checkpoint.keep` go.

    Raises:
        ValueError: the disk is too full, or a rank could not write.
    """
    folder = unfinished_folder(config.run.dir, step)
    stretches, scalars = stretches_to_save(engine)
    needed = sum(on_all(lambda: sum(stretch.num_bytes for stretch in stretches)))
    on_main(partial(make_room, folder, needed))
    records: dict[str, Record] = {}
    for share in on_all(partial(_write_share, folder, dist.get_rank(), stretches, scalars)):
        records |= share
    state = {
        "step": step,
        "data": data_state,
        "world_size": dist.get_world_size(),
        "zero_stage": config.engine.stage,
        "versions": {name: version(name) for name in _PACKAGES},
        **identity(engine.module, config),
    }
    path: Path = on_main(partial(_finish, folder, state, records, config.checkpoint.keep))
    return path


def _write_share(
    folder: Path, rank: int, stretches: list[Stretch], scalars: Scalars
) -> dict[str, Record]:
    payload, generators = f"rank-{rank:05d}.safetensors", f"random-{rank:05d}.safetensors"
    return {
        payload: write_payload(folder / payload, stretches, scalars),
        generators: write_synced(folder / generators, dump_generators()),
    }


def _finish(folder: Path, state: dict[str, Any], records: dict[str, Record], keep: int) -> Path:
    text = json.dumps(state, indent=2) + "\n"
    records["state.json"] = write_synced(folder / "state.json", text.encode())
    write_manifest(folder, records)
    sync_directory(folder)
    path = put_in_place(folder, state["step"])
    retire(path.parent.parent, state["step"], keep)
    return path
