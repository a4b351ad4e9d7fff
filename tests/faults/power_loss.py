"""The power goes at any point of a save: of what was not synced any part may be on the disk.

What both ranks did to the disk is recorded from a real run and played again up to a point. Of a
file, what was written since its last sync is then there, or in part, or as zeros; of a folder, the
names made, changed and removed since its last sync are there or not, each for itself or in order.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tests.faults.crash_points import KILLED, SAVED, WORDS
from tests.faults.disk_calls import Call, watch_disk
from tests.faults.outcome import Outcome
from tests.faults.toy import on_ranks, train_toy

LOSSES = 12  # seeded ones of each point
Event = list[Any]  # when, kind, path, to, data in hex: a call; or `said`, step


def power_loss(folder: Path, short: bool) -> Outcome:
    """At every point of two saves, one in the background."""
    before, run_dir, found = folder / "before", folder / "run", folder / "found"
    on_ranks(partial(train_toy, before, SAVED), folder / "before.txt")
    shutil.copytree(before, run_dir)
    codes = on_ranks(partial(_record, run_dir), folder / "run.txt")
    assert codes == [0, 0], (folder / "run.txt").read_text()
    seeds = 1 if short else LOSSES
    codes = on_ranks(
        partial(_lose, before, run_dir, seeds, found), folder / "said.txt", 1, timeout=3600
    )
    assert codes == [0], (folder / "said.txt").read_text()
    return Outcome(**json.loads(found.read_text()))


def _record(run_dir: Path) -> None:
    """Train, and write down what this rank does to the disk, and which steps it calls saved."""
    import torch.distributed as dist

    from triptych_core.metrics import Metrics

    events: list[Event] = []
    note, below = Metrics.note, run_dir / "checkpoints"

    def tell(kinds: tuple[str, ...], call: Call) -> None:
        if call.kind in kinds:
            path, to = (os.path.relpath(p, below) if p else "" for p in (call.path, call.to))
            events.append([time.monotonic_ns(), call.kind, path, to, call.data.hex()])

    def said(self: Any, text: str) -> None:
        note(self, text)
        if text.startswith("saved "):
            events.append([time.monotonic_ns(), "said", text.rpartition("/")[2], "", ""])

    watch_disk(
        below,
        partial(tell, ("create", "mkdir", "rename", "remove", "rmdir", "write")),
        partial(tell, ("sync",)),  # only when it has returned
    )
    Metrics.note = said  # type: ignore[method-assign]
    train_toy(run_dir, KILLED, *WORDS)
    (run_dir / f"events-{dist.get_rank()}.json").write_text(json.dumps(events))


def _lose(before: Path, run_dir: Path, seeds: int, found: Path) -> None:
    from triptych_core.checkpoint.folders import checkpoints

    outcome, chance = Outcome(), random.Random(0)
    files = run_dir.glob("events-*.json")
    events = sorted(event for file in files for event in json.loads(file.read_text()))
    ends = {path.name: _bytes_in(path) for path in checkpoints(before)}
    told, disk = f"step-{SAVED:06d}", Disk.of(before / "checkpoints")
    whole = Disk.of(before / "checkpoints")
    for event in events:
        whole.do(*event[1:])
        if event[1] == "rename" and event[3] not in ends and event[3].startswith("step-"):
            ends[event[3]] = {name: whole.read(f"{event[3]}/{name}") for name in whole.ls(event[3])}
    for number, event in enumerate(events):
        told = event[2] if event[1] == "said" else told
        disk.do(*event[1:])
        for _ in range(seeds):
            target = run_dir.with_name("lost") / "checkpoints"
            disk.write_what_is_left(target, chance)
            what = f"after {number} of {len(events)}, {event[1]} {event[2]}"
            _look(outcome, what, target, told, ends)
            shutil.rmtree(target.parent)
    found.write_text(json.dumps(vars(outcome)))


def _look(
    outcome: Outcome, what: str, folder: Path, told: str, ends: dict[str, dict[str, bytes]]
) -> None:
    """The newest whole checkpoint is one that was written, and none older than was said."""
    from triptych_core.checkpoint.folders import checkpoints
    from triptych_core.checkpoint.load import newest_whole

    try:
        taken = newest_whole(checkpoints(folder.parent))
    except ValueError as error:
        outcome.add(f"{what}: {error}", detected=True, recovered=False)
        return
    same = _bytes_in(taken) == ends[taken.name]
    outcome.add(f"{what}: {taken.name}", recovered=same and taken.name >= told, wrong=not same)


def _bytes_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@dataclass
class _File:
    """Bytes as programs see them, and as they were when last synced."""

    now: bytes = b""
    synced: bytes = b""


@dataclass
class _Folder:
    """Names as programs see them, as they were when last synced, and every change since."""

    now: dict[str, Any] = field(default_factory=dict)
    synced: dict[str, Any] = field(default_factory=dict)
    changes: list[Callable[[dict[str, Any]], None]] = field(default_factory=list)

    def change(self, change: Callable[[dict[str, Any]], None]) -> None:
        change(self.now)
        self.changes.append(change)


class Disk:
    """Files and folders below one, with what is on the disk of them for certain."""

    def __init__(self) -> None:
        self.root = _Folder()

    @classmethod
    def of(cls, folder: Path) -> Disk:
        """What is in a folder, all of it synced."""
        disk = cls()
        disk.root = _read(folder)
        return disk

    def do(self, kind: str, path: str, to: str = "", data: str = "") -> None:
        """Play a call again."""
        if kind == "said":
            return
        if kind == "sync":
            self._sync(self._find(path))
            return
        if kind == "write":
            self._find(path).now += bytes.fromhex(data)
            return
        parent, name = Path(path).parent, Path(path).name
        folder = self._find(str(parent))
        if kind == "rename":
            assert Path(to).parent == parent, (path, to)
            folder.change(partial(_rename, name, Path(to).name))
        elif kind in ("create", "mkdir"):
            folder.change(partial(_put, name, _File() if kind == "create" else _Folder()))
        else:
            folder.change(partial(_drop, name))

    def ls(self, path: str) -> list[str]:
        """Names in a folder, now."""
        return list(self._find(path).now)

    def read(self, path: str) -> bytes:
        """A file, now."""
        return bytes(self._find(path).now)

    def write_what_is_left(self, target: Path, chance: random.Random) -> None:
        """The power goes: one of the states in which the disk may then be."""
        _write(self.root, target, chance)

    def _find(self, path: str) -> Any:
        found: Any = self.root
        for name in Path(path).parts:
            found = found.now[name]
        return found

    def _sync(self, found: Any) -> None:
        if isinstance(found, _File):
            found.synced = found.now
        else:
            found.synced, found.changes = dict(found.now), []


def _rename(name: str, to: str, names: dict[str, Any]) -> None:
    if name in names:
        names[to] = names.pop(name)


def _put(name: str, what: Any, names: dict[str, Any]) -> None:
    names[name] = what


def _drop(name: str, names: dict[str, Any]) -> None:
    names.pop(name, None)


def _read(path: Path) -> Any:
    if path.is_file():
        return _File(path.read_bytes(), path.read_bytes())
    names = {child.name: _read(child) for child in path.iterdir()}
    return _Folder(names, dict(names))


def _write(found: Any, path: Path, chance: random.Random) -> None:
    if isinstance(found, _File):
        path.write_bytes(_some_of(found, chance))
        return
    path.mkdir(parents=True)
    names, changes = dict(found.synced), list(found.changes)
    if chance.random() < 0.5:
        changes = changes[: chance.randint(0, len(changes))]
    else:
        changes = [change for change in changes if chance.random() < 0.5]
    for change in changes:
        change(names)
    for name, child in names.items():
        _write(child, path / name, chance)


def _some_of(file: _File, chance: random.Random) -> bytes:
    """What a file has when the power went: all, its begin, zeros, or what was last synced."""
    if file.now == file.synced:
        return file.now
    cut = chance.randint(0, len(file.now))
    zeros = file.now[:cut] + bytes(len(file.now) - cut)
    return chance.choice([file.now, file.now[:cut], zeros, file.synced])
