"""An output that is not whole yet: beside the final folder, with a list of what is on the disk."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

from triptych_core.checkpoint.manifest import sync_directory, write_synced

_PLAN, _DONE = ".plan", ".done"


class Unfinished:
    """The folder that becomes the output once everything is in it.

    A folder that a killed run left is gone on with, if it was of the same plan, and else emptied.

    Args:
        final: where the output will be.
        fingerprint: of the plan.

    Raises:
        ValueError: the output exists, its parent does not, or another process writes it.
    """

    def __init__(self, final: Path, fingerprint: str) -> None:
        check_output(final)
        self.final = final
        self.path = partial_of(final)
        self.path.mkdir(exist_ok=True)
        self._lock = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise ValueError(
                f"--output: must be written by one process, got {final} under work by another; "
                "wait for it or name another output"
            ) from None
        if fingerprint_in(self.path) != fingerprint:
            _empty(self.path)
            write_synced(self.path / _PLAN, fingerprint.encode())
        done = self.path / _DONE
        self.done = set(done.read_text().split("\n")[:-1]) if done.is_file() else set()

    def __enter__(self) -> Unfinished:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)

    def mark_done(self, file: str) -> None:
        """Note that a file has been written and synced."""
        with (self.path / _DONE).open("a") as done:
            done.write(f"{file}\n")
            done.flush()
            os.fsync(done.fileno())

    def write(self, name: str, data: bytes) -> None:
        """Write a small file through to the disk."""
        write_synced(self.path / name, data)

    def put_in_place(self) -> None:
        """Give the whole output its name.

        Raises:
            ValueError: something has that name by now.
        """
        for name in (_PLAN, _DONE):
            (self.path / name).unlink(missing_ok=True)
        sync_directory(self.path)
        check_output(self.final)
        self.path.rename(self.final)
        sync_directory(self.final.parent)


def partial_of(final: Path) -> Path:
    """Where an output is written until it is whole."""
    return final.with_name(f".{final.name}.averaging")


def fingerprint_in(partial: Path) -> str | None:
    """Of the plan that a half-written output belongs to."""
    path = partial / _PLAN
    return path.read_text() if path.is_file() else None


def check_output(final: Path) -> None:
    """Nothing is overwritten.

    Raises:
        ValueError: the output exists or has no parent.
    """
    if final.exists():
        raise ValueError(f"--output: must not exist, got {final}; name a new folder")
    if not final.parent.is_dir():
        raise ValueError(f"--output: must be in a folder that exists, got {final}; make it first")


def check_disk(final: Path, needed: int) -> None:
    """The disk takes what will be written.

    Raises:
        ValueError: it does not.
    """
    free = shutil.disk_usage(final.parent).free
    if free < needed:
        raise ValueError(
            f"--output: must have {needed / 2**30:.2f} GiB free, got {free / 2**30:.2f} in "
            f"{final.parent}; free space or choose another disk"
        )


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
