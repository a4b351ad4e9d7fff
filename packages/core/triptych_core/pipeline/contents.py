"""What stands at a path: whether an output is whole, and a fingerprint that tells of changes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from triptych_core.pipeline.config import Kind

WHOLE_BYTES = 1 << 22  # files up to this size are read whole
STRETCH, STRETCHES = 1 << 16, 64  # of larger ones: as many bytes, spread evenly
MANY_FILES = 1000  # a folder of more is told by names and sizes alone


def is_complete(kind: Kind, path: Path) -> bool:
    """Whether an output of this kind is there and whole, as far as its own index tells."""
    if kind == "model":
        return (path / "config.json").is_file() and _has_weights(path)
    if kind == "run":
        return _is_finished(path / "run.json")
    if kind == "shards":
        tars = list(path.glob("*.tar")) if path.is_dir() else [path] * path.is_file()
        return bool(tars) and all(tar.with_name(f"{tar.name}.idx").is_file() for tar in tars)
    if kind == "folder":
        return path.is_dir() and any(path.iterdir())
    if kind == "file":
        return path.is_file() and path.stat().st_size > 0
    return read_json(path) is not None


def fingerprint(path: Path) -> str:
    """SHA-256 of the names and contents below a path, in seconds at any size.

    A file above 4 MiB gives its size and 64 stretches of 64 KiB, spread evenly with both ends; a
    tar its size, since the index beside it has checksums of every byte; a folder of more than a
    thousand files names and sizes alone. No times: a copied folder is the same. Lengths that a
    stage notes beside shards do not count.
    """
    digest = hashlib.sha256()
    files = sorted(_files(path))
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)} {size}\n".encode())
        is_indexed = file.suffix == ".tar" and file.with_name(f"{file.name}.columns").is_file()
        if len(files) <= MANY_FILES and not is_indexed:
            for piece in _pieces(file, size):
                digest.update(piece)
    return digest.hexdigest()


def fingerprint_output(kind: Kind, path: Path) -> str:
    """Of what a step made; of a run that it is finished, as its reports may be drawn again."""
    if kind == "run":
        finished = (read_json(path / "run.json") or {}).get("finished")
        return hashlib.sha256(str(finished).encode()).hexdigest()
    return fingerprint(path)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None if there is none, or no file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _files(path: Path) -> Iterator[Path]:
    """All files below, without hidden ones, which are notes of tools."""
    if path.is_file():
        yield path
        return
    for file in path.rglob("*"):
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if file.is_file() and not hidden and ".tar.lengths-" not in file.name:
            yield file


def _pieces(file: Path, size: int) -> Iterator[bytes]:
    with file.open("rb") as stream:
        if size <= WHOLE_BYTES:
            yield stream.read()
            return
        for number in range(STRETCHES):
            stream.seek(number * (size - STRETCH) // (STRETCHES - 1))
            yield stream.read(STRETCH)


def _has_weights(path: Path) -> bool:
    """All files that the index of the weights names, or any weights where there is none."""
    for suffix in ("safetensors", "bin"):
        index = next(iter(sorted(path.glob(f"*.{suffix}.index.json"))), None)
        if index is not None:
            named = set((read_json(index) or {}).get("weight_map", {}).values())
            return bool(named) and all((path / name).is_file() for name in named)
        if any(path.glob(f"*.{suffix}")):
            return True
    return False


def _is_finished(path: Path) -> bool:
    return bool((read_json(path) or {}).get("finished"))
