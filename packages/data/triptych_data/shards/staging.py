"""The folder where a run works until all its shards are whole, and from which it goes on."""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triptych_data.shards.index import write_whole

STAGING = ".partial"
CHECKED = "checked"
"""What `checked.Checked` keeps in the folder; a run that is not even there yet leaves nothing."""
SKIPPED = "skipped.jsonl"
OURS = re.compile(
    r"shard-\d{6,}\.tar(\.idx|\.columns|\.lengths-[0-9a-f]+\.safetensors)?|skipped\.jsonl"
)
"""Names that we write, cached lengths included, and --overwrite may remove."""


@dataclass(frozen=True, slots=True)
class Staging:
    """`folder` is a run's own until it ends; what shall appear in `output` waits in `shards`."""

    output: Path
    folder: Path
    resumed: bool
    """whether an earlier run of the same identity worked here"""

    @property
    def shards(self) -> Path:
        return self.folder / "shards"

    @property
    def scratch(self) -> Path:
        return self.folder / "scratch"

    @property
    def publishing(self) -> bool:
        """Whether all was whole already when an earlier run ended."""
        return (self.folder / "publishing").exists()

    def publish(self) -> list[Path]:
        """Remove old shards of `output` and move the new ones in, each tar after its index.

        Returns the tars. A run that is killed in between does only the rest when it goes on.
        """
        if not self.publishing:
            for path in self.output.iterdir():
                if OURS.fullmatch(path.name):
                    path.unlink()
            write_whole(self.folder / "publishing", b"")
        ready = [path for path in self.shards.iterdir() if OURS.fullmatch(path.name)]
        for path in sorted(ready, key=lambda path: (path.suffix == ".tar", path)):
            path.replace(self.output / path.name)
        _sync(self.output)
        shutil.rmtree(self.folder)
        return sorted(path for path in self.output.glob("*.tar") if OURS.fullmatch(path.name))


@contextmanager
def staging(output: Path, identity: dict[str, Any], *, overwrite: bool) -> Iterator[Staging]:
    """A run's own folder in `output`, kept when the run ends before it has published.

    A run of the same `identity` goes on where the last one ended. Raises ValueError when `output`
    holds anything else, unless `overwrite`, when another run works there, and when shards of an
    identity that differs would be lost.
    """
    output.mkdir(parents=True, exist_ok=True)
    folder = output / STAGING
    present = sorted(path.name for path in output.iterdir() if path.name != STAGING)
    if present and not overwrite and not (folder / "publishing").exists():
        raise ValueError(
            f"{output}: the output folder must be empty, got {len(present)} entries such as "
            f"{present[0]}; name another, or replace old shards with --overwrite"
        )
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{output}: one run at a time must write here, got another at work; wait for it, "
                "or name another folder"
            ) from error
        found = Staging(output, folder, _goes_on(folder, identity, overwrite))
        found.shards.mkdir(exist_ok=True)
        found.scratch.mkdir(exist_ok=True)
        try:
            yield found
        except BaseException:
            if not _worth_keeping(folder):
                shutil.rmtree(folder)
            raise


def progress_kept(output: Path) -> str:
    """What of an unfinished run is kept, for people."""
    folder = output / STAGING
    if not _worth_keeping(folder):
        return "nothing was written; the same command begins anew"
    shards = len(list((folder / "shards").glob("*.tar.idx")))
    what = f"{shards:,} finished shards" if shards else "the records checked so far"
    return f"{what} are kept in {folder}; the same command goes on from there"


def _worth_keeping(folder: Path) -> bool:
    checked = folder / CHECKED
    finished = any((folder / "shards").glob("*.tar.idx"))
    return finished or (checked.exists() and checked.stat().st_size > 0)


def _goes_on(folder: Path, identity: dict[str, Any], overwrite: bool) -> bool:
    """Whether the folder is of a run with this identity; it is emptied if not."""
    record = folder / "run.json"
    new = json.loads(json.dumps(identity))
    old = _read(record)
    if old == new:
        return True
    shards = folder / "shards"
    finished = len(list(shards.glob("*.tar.idx"))) if shards.exists() else 0
    if old and finished and not overwrite:
        changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
        raise ValueError(
            f"{folder}: {changed[0]} must be that of the unfinished run, got "
            f"{_short(new.get(changed[0]))} instead of {_short(old.get(changed[0]))}; repeat its "
            f"command to keep its {finished} finished shards, or begin anew with --overwrite"
        )
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()
    write_whole(record, json.dumps(new).encode())
    return False


def _read(record: Path) -> Any:
    try:
        return json.loads(record.read_bytes())
    except (OSError, ValueError):
        return None


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
