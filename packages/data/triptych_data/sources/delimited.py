"""CSV and TSV with a header line; quoted fields may hold delimiters and line breaks."""

import csv
import io
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from triptych_data.sources.source import RECORD_LIMIT, Reopened, Row
from triptych_data.sources.spans import Span, Spans, find_spans


@dataclass(frozen=True)
class DelimitedRows(Reopened):
    """Rows after the header, which is the first span; each value is a string."""

    spans: Spans
    delimiter: str

    @property
    def root(self) -> Path:
        return self.spans.path.parent

    def __len__(self) -> int:
        return len(self.spans.spans) - 1

    def where(self, row: int) -> str:
        return f"{self.spans.path}:{self.spans.number(row + 1)}"

    def read(self, row: int) -> Row:
        where = self.where(row)
        fields = self._fields(row + 1, where)
        if len(fields) != len(self.header):
            raise ValueError(
                f"{where}: a row must have the {len(self.header)} fields of the header, got "
                f"{len(fields)}; quote fields that hold the delimiter or a line break"
            )
        return dict(zip(self.header, fields, strict=True))

    def pieces(self) -> np.ndarray | None:
        return None

    @cached_property
    def header(self) -> list[str]:
        return self._fields(0, str(self.spans.path))

    def _fields(self, span: int, where: str) -> list[str]:
        csv.field_size_limit(RECORD_LIMIT)
        try:
            text = self.spans.bytes(span, where).decode("utf-8-sig" if span == 0 else "utf-8")
            [fields] = csv.reader(io.StringIO(text, newline=""), delimiter=self.delimiter)
        except (ValueError, csv.Error) as error:
            raise ValueError(
                f"{where}: must be a row in UTF-8, got {error}; fix the file"
            ) from error
        return fields


def open_csv(path: Path, scratch: Path) -> DelimitedRows:
    """Comma-separated rows. Raises ValueError for a header alone or with a name twice."""
    return _open(path, scratch, ",")


def open_tsv(path: Path, scratch: Path) -> DelimitedRows:
    """Tab-separated rows; raises as `open_csv`."""
    return _open(path, scratch, "\t")


def _open(path: Path, scratch: Path, delimiter: str) -> DelimitedRows:
    found = find_spans(path, scratch, partial(_records, delimiter=delimiter.encode()))
    rows = DelimitedRows(found, delimiter)
    twice = sorted({name for name in rows.header if rows.header.count(name) > 1})
    if twice:
        raise ValueError(
            f"{path}: the header must name each column once, got {twice[0]!r} twice; rename one"
        )
    if not len(rows):
        raise ValueError(f"{path}: the input must hold a record, got a header alone; add rows")
    return rows


def _records(data: mmap.mmap, path: Path, delimiter: bytes) -> Iterator[Span]:
    """Records by the number of their first line: a line break inside quotes ends none."""
    start = at = number = 0
    first, quoted = 1, False
    while at < len(data):
        number += 1
        end = data.find(b"\n", at) + 1 or len(data)
        if end - start > RECORD_LIMIT:
            raise ValueError(
                f"{path}:{first}: a record must have at most {RECORD_LIMIT} bytes, got a quote "
                "that does not close; fix the quoting"
            )
        if quoted:  # over all lines that the field holds: one by one takes minutes
            quote = data.find(b'"', at)
            if quote < 0:
                break
            skipped = data[at:quote].count(b"\n")
            if skipped:
                number += skipped
                at = data.rfind(b"\n", at, quote) + 1
                end = data.find(b"\n", at) + 1 or len(data)
        line = data[at:end]
        quoted = _open_quote(line, quoted, delimiter) if quoted or b'"' in line else False
        if not quoted:
            if not data[start:end].isspace():
                yield first, start, end
            start, first = end, number + 1
        at = end
    if quoted:
        raise ValueError(
            f"{path}:{first}: a quoted field must close, got the end of the file; fix the quoting"
        )


def _open_quote(line: bytes, quoted: bool, delimiter: bytes) -> bool:
    """Whether a quoted field is open at the end of `line`, if one was (`quoted`) at its start."""
    at = 0
    while True:
        if not quoted:
            if at == 0 and line.startswith(b'"'):
                at = 1
            elif (found := line.find(delimiter + b'"', at)) >= 0:
                at = found + 2
            else:
                return False
        while (quote := line.find(b'"', at)) >= 0 and line[quote + 1 : quote + 2] == b'"':
            at = quote + 2
        if quote < 0:
            return True
        at, quoted = quote + 1, False
