"""What a hostile file is, and small parts that many are made of."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from tests.hostile.watch import CANARY


class Case(NamedTuple):
    """A hostile file.

    make: writes it into an empty folder, returns the path that a door gets. doors: those that take
    such files. inert: it may be taken, as what is hostile in it means nothing here.
    """

    name: str
    make: Callable[[Path], Path]
    doors: tuple[str, ...]
    inert: bool = False


def canary() -> str:
    """The path that no payload may touch, and no path may lead to."""
    return os.environ[CANARY]


class Payload:
    """Its pickle runs a shell when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {canary()}",)


def write_tar(path: Path, members: list[tuple[tarfile.TarInfo | str, bytes]]) -> Path:
    """A tar of members; a header as it is given, but for its size."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for member, data in members:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            info.size = len(data)
            tar.addfile(info, BytesIO(data))
    return path


def writer(name: str, data: Callable[[], bytes] | bytes) -> Callable[[Path], Path]:
    """Makes one file of those bytes."""

    def make(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(data if isinstance(data, bytes) else data())
        return path

    return make
