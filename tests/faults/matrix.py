"""All rows of the fault matrix, and the guards without which one of them is red."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from tests.faults import settings
from tests.faults.bad_steps import bad_steps, too_many_in_a_row
from tests.faults.crash_points import crash_points
from tests.faults.damage import damaged_checkpoints, damaged_shards
from tests.faults.full_disk import full_disk
from tests.faults.hostile_files import hostile_files
from tests.faults.launchers import launchers, supervised
from tests.faults.lost_ranks import lost_ranks
from tests.faults.moves import moves
from tests.faults.outcome import Row
from tests.faults.power_loss import power_loss
from tests.faults.stage_jobs import hangs, stops

ROWS = [
    Row("kill", "SIGKILL at each thing that saves do to the disk, of each rank", crash_points),
    Row("rank", "SIGKILL in each part of a step, of each rank", lost_ranks),
    Row("power", "power loss at each point of a save, anything unsynced lost", power_loss),
    Row("checkpoint", "damaged checkpoint", damaged_checkpoints),
    Row("shard", "damaged shard or index", damaged_shards),
    Row("disk", "full disk, from some byte of a save on", full_disk),
    Row("nan", "NaN, Inf, spike", bad_steps),
    Row("row", "bad steps in a row", too_many_in_a_row),
    Row("move", "goes on with other ranks, other ZeRO stage", moves),
    Row("settings", "mistakes in a configuration", settings.wrong_settings),
    Row("stop", "SIGUSR1, SIGTERM, Ctrl-C, a second one, grace expires", stops),
    Row("hang", "a rank, a data worker, a decode stands still; a skipped collective", hangs),
    Row("launcher", "SIGTERM or SIGKILL to deepspeed or torchrun, also at once", launchers),
    Row("restart", "supervised: a rank is killed, then one stands still", supervised),
    Row("hostile", "hostile files", hostile_files),
]


class Guard(NamedTuple):
    """What is switched off in a process of its own, and which row must then be red."""

    name: str
    disable: Callable[[], None]
    row: str


def _checksums() -> None:
    from triptych_core.checkpoint import load
    from triptych_core.checkpoint.manifest import find_loss

    _put(load, "find_damage", lambda path, share=0, shares=1: find_loss(path))


def _manifest() -> None:
    from triptych_core.checkpoint import load

    _put(load, "find_damage", lambda path, share=0, shares=1: None)


def _temporary_name() -> None:
    """Written under its last name, and every folder of that name counts."""
    from triptych_core.checkpoint import save

    _manifest()
    _put(save, "unfinished_folder", lambda run, step: run / f"checkpoints/step-{step:06d}")
    _put(save, "put_in_place", lambda folder, step: folder)


def _synced_files() -> None:
    """Bytes are left to the system when a file gets its name."""
    import os
    from pathlib import Path
    from types import SimpleNamespace

    from triptych_core.checkpoint import manifest

    def sync(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").is_dir():
            os.fsync(descriptor)

    _put(manifest, "os", SimpleNamespace(**(vars(os) | {"fsync": sync})))


def _synced_names() -> None:
    """A checkpoint is called saved, and older ones go, before its name is on the disk."""
    from triptych_core.checkpoint import folders

    _put(folders, "sync_directory", lambda folder: None)


def _generators() -> None:
    from triptych_core.checkpoint import load

    _put(load, "load_generators", lambda path: None)


def _position() -> None:
    from tests.faults.toy import Packs

    _put(Packs, "load_state_dict", lambda self, state: None)


def _loss_guard() -> None:
    from triptych_core.faults.loss_guard import LossGuard

    _put(LossGuard, "is_on", property(lambda self: False))


def _spikes() -> None:
    import torch

    from triptych_core.faults.loss_window import LossWindow

    _put(LossWindow, "limits", lambda self: torch.full((2,), torch.inf))


def _one_verdict() -> None:
    """The first rank takes a spike that the others leave out."""
    import torch
    import torch.distributed as dist

    from triptych_core.faults.loss_guard import LossGuard

    admit = LossGuard._admit

    def alone(self: Any, scale: Any) -> Any:
        admitted = admit(self, scale)
        takes = dist.get_rank() == 0 and self._report[1:3].isfinite().all()
        return torch.nan_to_num(admitted, nan=1.0) if takes else admitted

    _put(LossGuard, "_admit", alone)


def _in_a_row() -> None:
    from triptych_core.faults.loss_guard import LossGuard

    learn = LossGuard.learn

    def forget(self: Any, report: Any) -> None:
        self._in_a_row = -100
        learn(self, report)

    _put(LossGuard, "learn", forget)


def _masters() -> None:
    """Weights come back, the states of the optimizer do not."""
    from triptych_core.checkpoint import fragments

    _put(fragments, "_make_states", lambda engine, flat, payloads, dtypes: None)


def _strictness() -> None:
    from triptych_core import config

    _put(config, "_unknown_keys", lambda cls, tree, prefix: iter(()))
    for section in (config.StageConfig, *_sections(config.StageConfig)):
        section.model_config["extra"] = "ignore"
        section.model_rebuild(force=True)


def _sections(cls: Any) -> list[Any]:
    kinds = [field.annotation for field in cls.model_fields.values()]
    return [kind for kind in kinds if hasattr(kind, "model_fields")]


class _LikeAny:
    def __ne__(self, other: object) -> bool:
        return False


def _shard_sums() -> None:
    from triptych_data.shards import reader

    _put(reader, "checksum", lambda span: _LikeAny())


def _full_disk() -> None:
    """A file that could not be written is said to be."""
    from contextlib import contextmanager, suppress

    from triptych_core.checkpoint import manifest, payload
    from triptych_core.checkpoint.manifest import synced_file

    @contextmanager
    def hidden(path: Any) -> Any:
        with suppress(ValueError), synced_file(path) as file:
            yield file

    _put(manifest, "synced_file", hidden)
    _put(payload, "synced_file", hidden)


def _put(where: Any, name: str, value: Any) -> None:
    assert hasattr(where, name), name
    setattr(where, name, value)


GUARDS = [
    Guard("checksums of a checkpoint are compared", _checksums, "checkpoint"),
    Guard("a checkpoint is checked at all", _manifest, "checkpoint"),
    Guard("written under another name, and checked", _temporary_name, "kill"),
    Guard("files are synced", _synced_files, "power"),
    Guard("names are synced before older checkpoints go", _synced_names, "power"),
    Guard("generators go on where they were", _generators, "kill"),
    Guard("data go on where they were", _position, "kill"),
    Guard("states of the optimizer come back", _masters, "move"),
    Guard("the loss guard", _loss_guard, "nan"),
    Guard("a spike is one", _spikes, "nan"),
    Guard("one verdict for all ranks", _one_verdict, "nan"),
    Guard("it ends after n in a row", _in_a_row, "row"),
    Guard("checksums of samples are compared", _shard_sums, "shard"),
    Guard("a failed write ends the save", _full_disk, "disk"),
    Guard("unknown keys are refused", _strictness, "settings"),
]
