"""What this process does to the disk below a folder, told call by call."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

_CHANGES = os.O_CREAT | os.O_WRONLY | os.O_RDWR


class Call(NamedTuple):
    """One thing done: create, write, half (of a write), sync, mkdir, rename, remove, rmdir."""

    kind: str
    path: str
    to: str = ""  # of a rename
    data: bytes = b""  # of a write, or of its half


Tell = Callable[[Call], None]


def watch_disk(below: Path, before: Tell, after: Tell = lambda call: None) -> None:
    """From now on `before` is told of every call below a folder, reading left out.

    Of syncs and writes `after` is told, too, when they have returned; `half` is told when half of
    a write is in the file. It cannot be undone: audit hooks stay.
    """

    def tell(kind: str, path: str, to: str = "") -> None:
        if _is_below(path, below):
            before(Call(kind, path, to))

    def watch(event: str, words: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(words[0], str | os.PathLike) and words[2] & _CHANGES:
            tell("create", os.fspath(words[0]))
        elif event == "os.rename":
            tell("rename", os.fspath(words[0]), os.fspath(words[1]))
        elif event in ("os.mkdir", "os.remove", "os.rmdir"):
            tell(event[3:], _path_of(words[0], words[-1]))

    sys.addaudithook(watch)
    _watch_syncs(below, before, after)
    _watch_writes(below, before, after)


def _is_below(path: str, folder: Path) -> bool:
    return f"{path}/".startswith(f"{folder}/")


def _path_of(name: Any, descriptor: int) -> str:
    """What a name means that is relative to an open folder, as shutil.rmtree's are."""
    folder = Path() if descriptor == -1 else _path_behind(descriptor)
    return str(folder / os.fspath(name))


def _path_behind(descriptor: int) -> Path:
    return Path(f"/proc/self/fd/{descriptor}").readlink()


def _watch_syncs(below: Path, before: Tell, after: Tell) -> None:
    sync = os.fsync

    def told(descriptor: int) -> None:
        call = Call("sync", str(_path_behind(descriptor)))
        is_told = _is_below(call.path, below)
        if is_told:
            before(call)
        sync(descriptor)
        if is_told:
            after(call)

    os.fsync = told


def _watch_writes(below: Path, before: Tell, after: Tell) -> None:
    open_path = Path.open

    def opened(self: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        file = open_path(self, mode, *args, **options)
        is_told = "w" in mode and _is_below(str(self), below)
        return _File(file, str(self), before, after) if is_told else file

    Path.open = opened  # type: ignore[method-assign]


class _File:
    """A file whose writes are told."""

    def __init__(self, file: Any, path: str, before: Tell, after: Tell) -> None:
        self._file, self._path, self._before, self._after = file, path, before, after

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: Any) -> int:
        whole = bytes(data)
        half = len(whole) // 2
        self._before(Call("write", self._path, data=whole))
        self._file.write(whole[:half])
        self._file.flush()
        self._before(Call("half", self._path, data=whole[:half]))
        self._file.write(whole[half:])
        self._after(Call("write", self._path, data=whole))
        return len(whole)
