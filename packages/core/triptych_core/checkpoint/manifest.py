"""What makes a folder a checkpoint: every file in it with its size and SHA-256."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

FILE = "manifest.json"

Record = dict[str, Any]  # `bytes` and `sha256` of a file


def write_manifest(folder: Path, records: Mapping[str, Record]) -> None:
    """Write and sync the manifest of files that have been written and synced."""
    files = {name: records[name] for name in sorted(records)}
    text = json.dumps({"files": files, "sha256": _digest(files)}, indent=2)
    write_synced(folder / FILE, text.encode())


def write_synced(path: Path, data: bytes) -> Record:
    """Write a file through to the disk; returns its record. Raises ValueError if it cannot."""
    with synced_file(path) as file:
        file.write(data)
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


@contextmanager
def synced_file(path: Path) -> Iterator[BinaryIO]:
    """A new file, on the disk once the block is left.

    Raises:
        ValueError: it could not be written.
    """
    try:
        with path.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ValueError(
            f"{path}: must be written whole, got {error.strerror}; make room and start again, the "
            "checkpoints before are whole"
        ) from error


def find_damage(folder: Path, share: int = 0, shares: int = 1) -> str | None:
    """What is wrong with a checkpoint, by file name; None if nothing is.

    All sizes are looked at; of the contents, every `shares`-th file from `share` on.
    """
    damage = find_loss(folder)
    if damage is not None:
        return damage
    files = read_manifest(folder)
    for name in list(files)[share::shares]:
        with (folder / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != files[name]["sha256"]:
            return f"{folder / name}: is damaged, its SHA-256 is not the one in {FILE}"
    return None


def find_loss(folder: Path) -> str | None:
    """Like `find_damage`, without reading the files: what is missing or of another size."""
    try:
        files = read_manifest(folder)
    except ValueError as error:
        return str(error)
    for name, record in files.items():
        path = folder / name
        if not path.is_file():
            return f"{path}: is missing"
        if path.stat().st_size != record["bytes"]:
            return f"{path}: has {path.stat().st_size} bytes instead of {record['bytes']}"
    return None


def read_manifest(folder: Path) -> dict[str, Record]:
    """The files of a checkpoint with their records.

    Raises:
        ValueError: there is no manifest, or not the one that was written.
    """
    path = folder / FILE
    if not path.is_file():
        raise ValueError(f"{path}: is missing")
    try:
        found = json.loads(path.read_bytes())
        files = dict(found["files"])
        if found["sha256"] == _digest(files) and all(map(_is_record, files.items())):
            return files
    except (ValueError, TypeError, KeyError, RecursionError):  # no JSON, or of another shape
        pass
    raise ValueError(f"{path}: is damaged")


def sync_directory(directory: Path) -> None:
    """Write the names in a directory through to the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_record(entry: tuple[str, Any]) -> bool:
    """Whether it names a file of this folder, and its size and SHA-256."""
    name, record = entry
    return Path(name).name == name and {type(record["bytes"]), type(record["sha256"])} == {int, str}


def _digest(files: dict[str, Record]) -> str:
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()
