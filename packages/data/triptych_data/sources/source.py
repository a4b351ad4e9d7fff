"""What every kind of input is to the writer: rows that any process can read in any order."""

from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np

Row = dict[str, Any]
"""A record as its file has it: column to value. Media are paths, bytes, or {"bytes", "path"}."""
RECORD_LIMIT = 1 << 28
"""Bytes of one text record, 256 MiB: beyond it the file is not what it was taken for."""


class Source(Protocol):
    """N rows, numbered from 0; cheap to pickle, since workers get a copy each."""

    @property
    def root(self) -> Path:
        """The folder that relative media paths start from."""

    def __len__(self) -> int: ...

    def where(self, row: int) -> str:
        """What an error about `row` begins with: file and line, or file and row."""

    def read(self, row: int) -> Row:
        """The row itself. Raises ValueError that begins with `where(row)` when it is damaged."""

    def pieces(self) -> np.ndarray | None:
        """The first rows (P,) int64 of stretches to read whole; None where any cut is as good."""


class Reopened:
    """A dataclass that pickles its fields only; a cached_property is opened anew everywhere."""

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
