"""Raw JSONL and media files to checked samples, in any order, by any number of processes."""

import base64
import binascii
import errno
import multiprocessing
import os
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import numpy as np

from triptych_data.probe import MediaInfo, probe_media
from triptych_data.sample import dump_json, parse_input, text_bytes
from triptych_data.workers import begin_worker

CHUNK = 8
"""Lines a worker takes at once: 8 decoded images hide the cost of a message, and bound memory."""
UNREADABLE = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EACCES,
    errno.ENAMETOOLONG,
    errno.ELOOP,
}
"""What says that a path is wrong; other errors of the system are not the sample's fault."""


class Prepared(NamedTuple):
    """A checked sample: its JSON as a shard stores it, the bytes and measures of its media in the
    order of their numbers, which in input is that of the text."""

    line: int
    json: bytes
    media: list[bytes]
    measures: list[MediaInfo]
    text_bytes: int


class Rejected(NamedTuple):
    """A line that is no sample, and why; `error` begins with file:line."""

    line: int
    error: str


@dataclass(frozen=True, slots=True)
class Lines:
    """The records of a JSONL file: line numbers from 1 and byte spans, (L,) int64 each."""

    path: Path
    number: np.ndarray
    start: np.ndarray
    end: np.ndarray

    def __len__(self) -> int:
        return len(self.number)


def scan_lines(path: Path) -> Lines:
    """Where the lines of a file lie; blank ones are left out. Raises ValueError without any."""
    spans, start = [], 0
    if not path.is_file():
        raise ValueError(f"{path}: the input must be a JSONL file, got no file; check the path")
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.isspace():
                spans.append((number, start, start + len(line)))
            start += len(line)
    if not spans:
        raise ValueError(f"{path}: the input must hold a record, got none; write one per line")
    columns = np.array(spans, dtype=np.int64).T
    return Lines(path, *columns)


def prepare_all(
    lines: Lines, order: np.ndarray, image_root: Path, num_workers: int
) -> Generator[Prepared | Rejected, None, None]:
    """Every line of `order` checked, in that order; with one worker in this process.

    At most two chunks a worker are in flight, so memory is bounded.
    """
    work = partial(prepare_chunk, lines.path, image_root)
    chunks = (
        [(int(lines.number[i]), int(lines.start[i]), int(lines.end[i])) for i in order[at:][:CHUNK]]
        for at in range(0, len(order), CHUNK)
    )
    num_workers = min(num_workers, len(order) // CHUNK)
    if num_workers <= 1:
        for chunk in chunks:
            yield from work(chunk)
        return
    # Not forked: the progress bar's thread may hold a lock. Not worker_context: no torch needed.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=begin_worker)
    pending = deque[Future[list[Prepared | Rejected]]]()
    try:
        for chunk in chunks:
            pending.append(pool.submit(work, chunk))
            if len(pending) >= 2 * num_workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    except BrokenProcessPool as error:
        raise ValueError(
            f"{lines.path}: every worker must live to the end, got one that was killed, often for "
            "memory; use fewer workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def prepare_chunk(
    path: Path, image_root: Path, chunk: list[tuple[int, int, int]]
) -> list[Prepared | Rejected]:
    """Read and check some lines, each given as (number, start, end), with all their media."""
    results: list[Prepared | Rejected] = []
    with path.open("rb") as file:
        for number, start, end in chunk:
            line = os.pread(file.fileno(), end - start, start)
            try:
                results.append(_prepare(line, number, f"{path}:{number}", image_root))
            except ValueError as error:
                results.append(Rejected(number, str(error)))
    return results


def _prepare(line: bytes, number: int, where: str, image_root: Path) -> Prepared:
    sample = parse_input(line, where)
    media = [_load(kind, source, where, image_root) for kind, source in sample.media]
    measures = [
        probe_media(data, kind, f"{where}: {kind} {source[:200]}")
        for data, (kind, source) in zip(media, sample.media, strict=True)
    ]
    return Prepared(number, dump_json(sample.json), media, measures, text_bytes(sample.json))


def _load(kind: str, source: str, where: str, image_root: Path) -> bytes:
    """The bytes of a medium given by path, `file://` or `data:` URI."""
    if source.startswith("data:"):
        return _decode_data_uri(source, where)
    name = unquote(source.removeprefix("file://")) if source.startswith("file://") else source
    if "://" in name[:16]:
        raise ValueError(
            f"{where}: {_a(kind)} must be a local file or a data: URI, got {source[:200]!r}; "
            "download it first"
        )
    path = image_root / name
    try:
        return path.read_bytes()
    except OSError as error:
        if error.errno not in UNREADABLE:
            raise
        reason = os.strerror(error.errno)
    except ValueError as error:  # a null byte
        reason = str(error)
    raise ValueError(
        f"{where}: {_a(kind)} must be a readable file, got {str(path)[:200]!r} ({reason}); "
        f"relative paths start at {image_root}: fix the path or set --image-root"
    )


def _decode_data_uri(source: str, where: str) -> bytes:
    head, _, payload = source.partition(",")
    try:
        if not head.endswith(";base64"):
            raise ValueError("no ;base64 before the comma")
        return base64.b64decode(payload, validate=True)
    except (ValueError, binascii.Error) as error:
        raise ValueError(
            f"{where}: a data: URI must be data:…;base64,…, got {head[:60]!r} ({error}); "
            "encode the file anew"
        ) from error


def _a(kind: str) -> str:
    return f"a {kind}" if kind == "video" else f"an {kind}"
