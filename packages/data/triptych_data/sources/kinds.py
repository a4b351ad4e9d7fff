"""From what a user names to rows: which kind of input each path is, and all of them as one."""

import difflib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from triptych_data.sources.arrow import (
    ParquetRows,
    in_any_order,
    open_arrow,
    open_parquet,
    saved_files,
)
from triptych_data.sources.delimited import open_csv, open_tsv
from triptych_data.sources.folder import DescribedRows, metadata_files, open_pairs
from triptych_data.sources.jsons import open_json, open_jsonl
from triptych_data.sources.source import Reopened, Row, Source
from triptych_data.sources.spans import COMPRESSED
from triptych_data.sources.tars import open_tar

OPENERS: dict[str, Callable[[Path, Path], Source]] = {
    "jsonl": open_jsonl,
    "json": open_json,
    "csv": open_csv,
    "tsv": open_tsv,
    "parquet": open_parquet,
    "arrow": open_arrow,
    "tar": open_tar,
    "folder": open_pairs,
}
SUFFIXES = {
    **{name: name for name in OPENERS if name != "folder"},
    "ndjson": "jsonl",
    "pq": "parquet",
    "feather": "arrow",
    "ipc": "arrow",
}
TEXTS = ("jsonl", "json", "csv", "tsv")


@dataclass(frozen=True)
class JoinedRows(Reopened):
    """Sources one behind another, as one."""

    sources: tuple[Source, ...]

    def __len__(self) -> int:
        return self._starts[-1]

    def where(self, row: int) -> str:
        source, row = self._locate(row)
        return source.where(row)

    def read(self, row: int) -> Row:
        source, row = self._locate(row)
        return source.read(row)

    def root_of(self, row: int) -> Path:
        """The folder that the media paths of `row` start from."""
        return self._locate(row)[0].root

    def pieces(self, most: int) -> np.ndarray:
        """The first rows (P,) int64 of what to read at once: `most` rows, or a source's pieces."""
        pieces = []
        for start, source in zip(self._starts, self.sources, strict=False):
            own = source.pieces()
            pieces.append(start + (np.arange(0, len(source), most) if own is None else own))
        return np.concatenate(pieces)

    def _locate(self, row: int) -> tuple[Source, int]:
        number = bisect_right(self._starts, row) - 1
        return self.sources[number], row - self._starts[number]

    @cached_property
    def _starts(self) -> list[int]:
        return list(accumulate(map(len, self.sources), initial=0))


def find_inputs(paths: Sequence[str | Path], kind: str | None = None) -> list[tuple[Path, str]]:
    """Every file to read with its kind, in the order named; what a folder or glob holds, sorted.

    `kind`, a key of OPENERS, is taken for each of them instead of what names say. Raises
    ValueError for a path that is not there or of no known kind.
    """
    found = [pair for path in paths for pair in _find(Path(path), kind)]
    if not found:
        raise ValueError("input: must name a file or folder, got none; add one")
    return found


def open_inputs(
    inputs: Sequence[tuple[Path, str]], scratch: Path, *, any_order: bool
) -> JoinedRows:
    """All rows of `inputs`. What reading them takes is kept in the folder `scratch`.

    With `any_order`, for a shuffle, what can only be read in order is first copied there.
    """
    sources: list[Source] = []
    for number, (path, kind) in enumerate(inputs):
        spot = scratch / f"{number:05d}"
        source = OPENERS[kind](path, spot)
        if any_order and isinstance(source, ParquetRows):
            source = in_any_order(source, spot)
        described = path.stem == "metadata" and kind in ("jsonl", "csv", "parquet")
        sources.append(DescribedRows(source) if described else source)
    return JoinedRows(tuple(sources))


def identity(inputs: Sequence[tuple[Path, str]]) -> list[list[Any]]:
    """Path, kind, size and time of change of every input: what a run that goes on compares."""
    stats = ((path.resolve(), kind, path.stat()) for path, kind in inputs)
    return [[str(path), kind, stat.st_size, stat.st_mtime_ns] for path, kind, stat in stats]


def _find(path: Path, kind: str | None) -> Iterator[tuple[Path, str]]:
    if path.is_dir():
        yield from _in_folder(path, kind)
    elif path.exists():
        yield path, kind or _kind(path)
    else:
        matches = sorted(_glob(path))
        if not matches:
            raise ValueError(
                f"{path}: the input must be a file, a folder or a glob, got nothing there; "
                f"{_suggestion(path)}"
            )
        for match in matches:
            yield match, kind or _kind(match)


def _in_folder(folder: Path, kind: str | None) -> list[tuple[Path, str]]:
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return [(path, "arrow") for path in saved_files(folder)]
    if kind == "folder":
        return [(folder, kind)]
    if metadata := metadata_files(folder):
        return [(path, kind or _kind(path)) for path in metadata]
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    kinds = {path: found for path in files if (found := _kind_of_name(path.name))}
    if kind:
        kinds = {path: found for path, found in kinds.items() if found == kind}
    several = sorted(set(kinds.values()) - {"json"})  # a.json may belong to a.jpg
    if len(several) > 1:
        raise ValueError(
            f"{folder}: a folder must hold files of one kind, got {', '.join(several)}; "
            "name the files, or the kind with --format"
        )
    if several or (kinds and len(kinds) == len(files)):
        wanted = several[0] if several else "json"
        return [(path, wanted) for path in files if kinds.get(path) == wanted]
    return [(folder, "folder")]


def _kind(path: Path) -> str:
    found = _kind_of_name(path.name)
    if not found:
        known = ", ".join(sorted(f".{suffix}" for suffix in SUFFIXES))
        raise ValueError(
            f"{path}: the name must end in one of {known}, or in .gz, .bz2, .xz after a text's, "
            "got another; rename the file or say what it is with --format"
        )
    return found


def _kind_of_name(name: str) -> str | None:
    stem = name.lower()
    packed = next((suffix for suffix in COMPRESSED if stem.endswith(suffix)), "")
    kind = SUFFIXES.get(stem.removesuffix(packed).rpartition(".")[2])
    return kind if not packed or kind in TEXTS else None


def _suggestion(path: Path) -> str:
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"did you mean {path.parent / near[0]}?" if near else "check the path"


def _glob(path: Path) -> Iterator[Path]:
    anchor = Path(path.anchor or ".")
    try:
        matches = list(anchor.glob(str(path.relative_to(path.anchor))))
    except (ValueError, NotImplementedError):
        return iter(())
    return (match for match in matches if match.is_file())
