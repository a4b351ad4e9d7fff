"""JSON Lines, and one JSON array of records."""

import json
import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from triptych_data.sample import load_json
from triptych_data.sources.source import RECORD_LIMIT, Reopened, Row
from triptych_data.sources.spans import Span, Spans, find_spans, lines

WINDOW = 1 << 20
BETWEEN = re.compile(rb"[ \t\r\n]*(,?)[ \t\r\n]*")
OPENING = re.compile(rb"(?:\xef\xbb\xbf)?[ \t\r\n]*\[")


@dataclass(frozen=True)
class JsonRows(Reopened):
    """Rows of JSONL (`mark` is ":", for line numbers) or of an array (`mark` "record ")."""

    spans: Spans
    mark: str = ":"

    @property
    def root(self) -> Path:
        return self.spans.path.parent

    def __len__(self) -> int:
        return len(self.spans.spans)

    def where(self, row: int) -> str:
        return f"{self.spans.path}{self.mark}{self.spans.number(row)}"

    def read(self, row: int) -> Row:
        where = self.where(row)
        value = load_json(self.spans.bytes(row, where), where)
        if not isinstance(value, dict):
            raise ValueError(
                f"{where}: a record must be a JSON object, got {repr(value)[:80]}; "
                'write {"messages": […]} or {"text": "…"}'
            )
        return value

    def pieces(self) -> np.ndarray | None:
        return None


def open_jsonl(path: Path, scratch: Path) -> JsonRows:
    """One record a line; blank lines are passed over."""
    return JsonRows(find_spans(path, scratch, lines))


def open_json(path: Path, scratch: Path) -> JsonRows:
    """One array of records. Raises ValueError, naming the byte, when it is no whole array."""
    return JsonRows(find_spans(path, scratch, _elements), mark=": record ")


def _elements(data: mmap.mmap, path: Path) -> Iterator[Span]:
    """The elements of a JSON array, read through a window so that the file is never in memory.

    Latin-1 gives each byte a character, and all of JSON's own characters are ASCII: what the
    standard decoder finds in that text are byte offsets, whatever the strings hold.
    """
    opening = OPENING.match(data)
    if not opening:
        got = bytes(data[:20])
        raise _damage(path, 0, "the file must hold an array [{…}, …]", repr(got))
    at, number, size = opening.end(), 0, WINDOW
    decode = json.JSONDecoder(strict=False).raw_decode
    at = _next(data, at, path, first=True)
    while data[at : at + 1] != b"]":
        window = data[at : at + size].decode("latin-1")
        inside = 0
        try:
            while inside < len(window) and window[inside] != "]":
                _, end = decode(window, inside)
                following = _next(data, at + end, path, first=False)
                number += 1
                yield number, at + inside, at + end
                inside = following - at
            size = WINDOW
        except (json.JSONDecodeError, RecursionError) as error:
            if inside == 0 and (at + size >= len(data) or size > RECORD_LIMIT):
                must = f"record {number + 1} must be valid JSON"
                raise _damage(path, at, must, str(error)) from error
            size = size if inside else 2 * size
        at += inside
    if data[at + 1 :].strip(b" \t\r\n"):
        raise _damage(path, at + 1, "nothing may follow the array", "more")


def _next(data: mmap.mmap, at: int, path: Path, *, first: bool) -> int:
    """The offset of the next element or of the closing bracket, after the comma between."""
    between = BETWEEN.match(data, at)
    assert between, "matches the empty string"
    closing = data[between.end() : between.end() + 1] == b"]"
    if between.end() >= len(data) or bool(between[1]) == (first or closing):
        raise _damage(
            path, at, "records must be parted by one comma and closed by ]", repr(data[at : at + 9])
        )
    return between.end()


def _damage(path: Path, at: int, must: str, got: str) -> ValueError:
    return ValueError(f"{path}: byte {at}: {must}, got {got}; fix the file, or write JSONL")
