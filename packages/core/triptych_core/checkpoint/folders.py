"""The folders of a run's checkpoints: which there are, and which may go."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from triptych_core.checkpoint.manifest import find_loss, sync_directory

_NAME = re.compile(r"step-\d{6,}")


def checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoints of a run, oldest first; half-written ones have another name."""
    found = (run_dir / "checkpoints").glob("step-*")
    return sorted((path for path in found if _NAME.fullmatch(path.name)), key=_step_of)


def unfinished_folder(run_dir: Path, step: int) -> Path:
    """Where a checkpoint is written until it is whole."""
    return run_dir / "checkpoints" / f"partial-step-{step:06d}"


def make_room(folder: Path, needed: int) -> None:
    """Make an unfinished folder, if the disk takes what will be in it.

    Raises:
        ValueError: fewer than `needed` bytes are free.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    sync_directory(folder.parent.parent)
    free = shutil.disk_usage(folder).free
    if free < needed:
        folder.rmdir()
        raise ValueError(
            f"run.dir: must have {needed / 2**30:.2f} GiB free for a checkpoint, got "
            f"{free / 2**30:.2f} in {folder.parent}; free space or lower checkpoint.keep"
        )


def put_in_place(unfinished: Path, step: int) -> Path:
    """Give a checkpoint that is whole, and on the disk, its name; returns its path."""
    final = unfinished.with_name(f"step-{step:06d}")
    _remove(final)
    unfinished.rename(final)
    sync_directory(final.parent)
    return final


def retire(run_dir: Path, step: int, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints, once that of `step` is in place.

    Those of later steps are of a past that this run did not take, and go; incomplete ones count for
    nothing, so that whole ones stay in their place. What killed runs left unfinished goes, too.
    """
    found = checkpoints(run_dir)
    whole = [path for path in found if _step_of(path) <= step and find_loss(path) is None]
    for path in found:
        if path not in whole[-keep:]:
            _remove(path)
    for path in (run_dir / "checkpoints").glob("partial-*"):
        shutil.rmtree(path)


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint so that no half of it ever carries a complete one's name."""
    if checkpoint.exists():
        doomed = checkpoint.with_name(f"partial-{checkpoint.name}-old")
        shutil.rmtree(doomed, ignore_errors=True)
        checkpoint.rename(doomed)
        shutil.rmtree(doomed)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
