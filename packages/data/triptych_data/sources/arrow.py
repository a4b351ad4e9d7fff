"""Arrow IPC and Feather files, Parquet files, and folders of `datasets.save_to_disk`."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from triptych_data.sources.source import Reopened, Row


@dataclass(frozen=True)
class _Tables(Reopened):
    """Rows of a file that holds them in several tables. `path` is the user's file."""

    path: Path

    @property
    def root(self) -> Path:
        return self.path.parent

    def __len__(self) -> int:
        return int(self._starts[-1])

    def where(self, row: int) -> str:
        return f"{self.path}: row {row}"

    def _place(self, row: int) -> tuple[int, int]:
        """The table that holds a row, and where in it."""
        table = int(np.searchsorted(self._starts, row, side="right")) - 1
        return table, row - int(self._starts[table])

    @cached_property
    def _starts(self) -> np.ndarray:
        """(number of tables + 1,) int64: the first row of each, and the number of all."""
        raise AssertionError("each format says")


@dataclass(frozen=True)
class ArrowRows(_Tables):
    """Rows of an Arrow file, mapped: a row costs what it holds."""

    file: Path

    def read(self, row: int) -> Row:
        batch, within = self._place(row)
        with readable(self.where(row)):
            [value] = self._batches[batch].slice(within, 1).to_pylist()
        return value

    def pieces(self) -> np.ndarray | None:
        return None

    @cached_property
    def _batches(self) -> list[Any]:
        pyarrow = import_pyarrow(self.path)
        with readable(self.path):
            data = pyarrow.memory_map(str(self.file))
            try:  # Feather and `pyarrow.ipc.new_file`; `datasets` writes streams
                table = pyarrow.ipc.open_file(data).read_all()
            except pyarrow.ArrowInvalid:
                data.seek(0)
                table = pyarrow.ipc.open_stream(data).read_all()
        return [batch for batch in table.to_batches() if len(batch)]

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.cumsum([0, *map(len, self._batches)])


@dataclass(frozen=True)
class ParquetRows(_Tables):
    """Rows of a Parquet file, a row group at a time: fast in the file's own order only."""

    def read(self, row: int) -> Row:
        number, within = self._place(row)
        if number not in self._group:
            self._group.clear()  # one at a time: a group of images may be large
            with readable(self.where(row)):
                self._group[number] = self.parquet.read_row_group(number)
        [value] = self._group[number].slice(within, 1).to_pylist()
        return value

    def pieces(self) -> np.ndarray | None:
        return self._starts[:-1]

    @cached_property
    def _group(self) -> dict[int, Any]:
        return {}

    @cached_property
    def parquet(self) -> Any:
        import_pyarrow(self.path)
        import pyarrow.parquet

        with readable(self.path):
            return pyarrow.parquet.ParquetFile(self.path, memory_map=True)

    @cached_property
    def _starts(self) -> np.ndarray:
        metadata = self.parquet.metadata
        counts = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        return np.cumsum([0, *counts])


def open_arrow(path: Path, scratch: Path) -> ArrowRows:
    """An Arrow file or stream. Raises ValueError when it is neither, or empty."""
    return _filled(ArrowRows(path, path))


def open_parquet(path: Path, scratch: Path) -> ParquetRows:
    """A Parquet file. Raises ValueError when it is none, or empty."""
    return _filled(ParquetRows(path))


def in_any_order(rows: ParquetRows, scratch: Path) -> ArrowRows:
    """The same rows as an Arrow file in `scratch`: Parquet has no access by row."""
    pyarrow = import_pyarrow(rows.path)
    file = scratch.with_name(scratch.name + ".arrow")
    if not file.exists():
        temporary = file.with_name(file.name + ".tmp")
        with (
            readable(rows.path),
            pyarrow.OSFile(str(temporary), "wb") as sink,
            pyarrow.ipc.new_file(sink, rows.parquet.schema_arrow) as writer,
        ):
            for group in range(rows.parquet.metadata.num_row_groups):
                writer.write_table(rows.parquet.read_row_group(group))
        temporary.replace(file)
    return ArrowRows(rows.path, file)


def saved_files(folder: Path) -> list[Path]:
    """The Arrow files of a `save_to_disk` folder, in order.

    Raises ValueError for several splits, and for names that lead out of the folder.
    """
    splits = folder / "dataset_dict.json"
    if splits.is_file():
        names = _read(splits).get("splits", [])
        if len(names) != 1:
            found = ", ".join(str(folder / str(name)) for name in names)
            raise ValueError(
                f"{folder}: the input must be one split, got {found}; name the one to shard"
            )
        return saved_files(folder / _plain(names[0], splits))
    state = folder / "state.json"
    files = [_plain(entry["filename"], state) for entry in _read(state).get("_data_files", [])]
    return [folder / name for name in files]


def import_pyarrow(path: Path) -> ModuleType:
    """Return pyarrow. Raises ValueError that says how to get it."""
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError as error:
        raise ValueError(
            f"{path}: pyarrow must be installed to read Parquet and Arrow, got {error}; "
            "run: pip install 'triptych-data[parquet]'"
        ) from error
    return pyarrow


@contextmanager
def readable(where: Path | str) -> Iterator[None]:
    """pyarrow's own errors, and what broken files make it raise, as a ValueError of `where`."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # the disk is full, no such file
            raise
        message = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{where}: must be a whole Arrow or Parquet file, got {message}; write it anew"
        ) from error


def _filled(rows: Any) -> Any:
    if not len(rows):
        raise ValueError(f"{rows.path}: the input must hold a record, got none; leave the file out")
    return rows


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: must be JSON, got {error}; save the dataset again") from error
    return value if isinstance(value, dict) else {}


def _plain(name: object, path: Path) -> str:
    if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name:
        raise ValueError(
            f"{path}: must name files of its own folder, got {name!r}; save the dataset again"
        )
    return name
