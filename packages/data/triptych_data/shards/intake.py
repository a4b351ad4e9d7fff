"""A row of any input to a checked sample: its chat brought into shard form, its media loaded."""

import base64
import binascii
import errno
import os
import re
import stat
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import numpy as np

from triptych_data.media.probe import MediaInfo, probe_media
from triptych_data.sample import (
    KINDS,
    dump_json,
    hear_videos,
    heard_parts,
    parse_record,
    text_bytes,
)
from triptych_data.shards.mapping import BLOB, Mapping, to_record
from triptych_data.shards.tarwriter import MOST_BYTES, span_bytes
from triptych_data.sources.kinds import JoinedRows
from triptych_data.sources.source import Reopened

MEASURES = ("tar_bytes", "text_bytes", "images", "videos", "audios")
"""What `Intake.measure` counts of each row; tar_bytes is BAD for a row that is no sample."""
BAD = -1
UNREADABLE = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EACCES,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.ENXIO,
}
"""What says that a path is wrong; other errors of the system are not the sample's fault."""
MOST_FOLDERS = 100_000
"""Folders whose resolved path is kept, some 20 MB of them."""
SCHEME = re.compile(r"pipe:|[A-Za-z][A-Za-z0-9+.-]*://")


class Prepared(NamedTuple):
    """A checked sample: its JSON as a shard stores it, the bytes and measures of its media in the
    order of their numbers, which in input is that of the text."""

    json: bytes
    media: list[bytes]
    measures: list[MediaInfo]
    text_bytes: int

    @property
    def tar_bytes(self) -> int:
        return span_bytes([len(self.json), *map(len, self.media)])


class Rejected(NamedTuple):
    """A row that is no sample, counted over all inputs from 0; `error` begins with file:line."""

    row: int
    error: str

    @property
    def reason(self) -> str:
        """What must hold, without file, position and value: the same for all rows of a kind."""
        return reason(self.error)


@dataclass(frozen=True)
class Intake(Reopened):
    """How rows become samples.

    Relative paths of media start at `media_root`, by default the folder of their input, and may
    not lead out of it unless `allow_outside`. With `decode` all media are decoded when measured,
    with `hear_videos` the sound of all videos is heard unless their parts say otherwise.
    """

    rows: JoinedRows
    mapping: Mapping
    media_root: Path | None = None
    allow_outside: bool = False
    decode: bool = True
    hear_videos: bool = False

    def measure(self, rows: np.ndarray) -> tuple[np.ndarray, list[Rejected]]:
        """Check rows (n,) in full. Returns (n, len(MEASURES)) int64 and what is no sample."""
        table = np.zeros((len(rows), len(MEASURES)), dtype=np.int64)
        rejected = []
        for at, row in enumerate(rows.tolist()):
            try:
                sample = self.prepare(row, decode=self.decode)
            except ValueError as error:
                table[at, 0] = BAD
                rejected.append(Rejected(row, " ".join(str(error).split())))
                continue
            kinds = [info.kind for info in sample.measures]
            kinds += ["audio" for info in sample.measures if info.sound]
            table[at] = (sample.tar_bytes, sample.text_bytes, *map(kinds.count, KINDS))
        return table, rejected

    def prepare(self, row: int, *, decode: bool) -> Prepared:
        """Row `row` as a sample. Raises ValueError that begins with its file and line."""
        where = self.rows.where(row)
        record, blobs = to_record(self.rows.read(row), self.mapping, where)
        sample = parse_record(record, where)
        root = self._root(self.media_root or self.rows.root_of(row))
        media, measures = [], []
        if self.hear_videos:
            hear_videos(sample.json)
        heard = heard_parts(sample.json)
        for number, (kind, source) in enumerate(sample.media):
            name = f"{kind} {number if source.startswith(BLOB) else source[:200]}"
            data = _load(source, f"{where}: {name}", blobs, root)
            media.append(data)
            info = probe_media(data, kind, f"{where}: {name}", decode=decode, sound=heard[number])
            measures.append(info)
        return Prepared(dump_json(sample.json), media, measures, text_bytes(sample.json))

    def _root(self, folder: Path) -> "_Root":
        if folder not in self._roots:
            self._roots[folder] = _Root(folder, self.allow_outside)
        return self._roots[folder]

    @cached_property
    def _roots(self) -> dict[Path, "_Root"]:
        return {}


def reason(error: str) -> str:
    """The middle of `file:line: part: what must hold, got …`, positions in the part left out."""
    return re.sub(r"\[\d+\]", "[]", error.split(", got ")[0].rsplit(": ", 1)[-1])[:120]


class _Root:
    """Where paths of media start and, unless `allow_outside`, must stay; links count resolved."""

    def __init__(self, folder: Path, allow_outside: bool) -> None:
        self.folder = folder
        self.allow_outside = allow_outside
        self._path = str(folder)
        self._resolved = os.path.realpath(folder)
        self._folders = dict[str, tuple[str, bool]]()

    def resolve(self, name: str) -> tuple[str, bool]:
        """The path that `name` leads to, and whether it lies in the folder."""
        folder, _, file = os.path.join(self._path, name).rpartition("/")  # noqa: PTH118
        if folder not in self._folders:  # resolving takes as long as reading: once per folder
            if len(self._folders) > MOST_FOLDERS:
                self._folders.clear()
            self._folders[folder] = self._resolve(folder or "/")
        resolved, inside = self._folders[folder]
        path = f"{resolved}/{file}"
        if file in ("", ".", "..") or os.path.islink(path):  # noqa: PTH114
            return self._resolve(path)
        return path, inside

    def _resolve(self, path: str) -> tuple[str, bool]:
        path = os.path.realpath(path)
        return path, path == self._resolved or path.startswith(self._resolved.rstrip("/") + "/")


def _load(source: str, where: str, blobs: list[bytes], root: _Root) -> bytes:
    """The bytes of a medium given by path, `file://` or `data:` URI, or as one of `blobs`."""
    if source.startswith(BLOB) and source[1:].isdecimal() and int(source[1:]) < len(blobs):
        return blobs[int(source[1:])]
    if source.startswith("data:"):
        return _decode_data_uri(source, where)
    name = unquote(source.removeprefix("file://")) if source.startswith("file://") else source
    if SCHEME.match(name):
        raise ValueError(
            f"{where}: a medium must be a local file or a data: URI, got {source[:200]!r}; "
            "nothing is fetched or run: download it first"
        )
    try:
        path, inside = root.resolve(name)
        if not inside and not root.allow_outside:
            raise ValueError(
                f"{where}: a medium must lie in {root.folder}, got a path that leads to "
                f"{path[:200]!r}; set --media-root to a folder that holds all media, or, if you "
                "trust the input, --allow-outside"
            )
        return _read_file(path, where)
    except OSError as error:
        if error.errno not in UNREADABLE:
            raise
        problem = os.strerror(error.errno)
    except ValueError as error:
        if "null" not in str(error):
            raise
        problem = "a null byte in its name"
    raise ValueError(
        f"{where}: a medium must be a readable file, got {str(root.folder / name)[:200]!r} "
        f"({problem}); relative paths start at {root.folder}: fix the path or set --media-root"
    )


def _read_file(path: str, where: str) -> bytes:
    """The bytes of a regular file; of a pipe or device nothing is read, so nothing can hang."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(descriptor, "rb", buffering=0) as file:  # noqa: PTH123
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_BYTES:
            raise ValueError(
                f"{where}: a medium must be a regular file of at most {MOST_BYTES} bytes, got "
                f"mode {stat.filemode(status.st_mode)}, {status.st_size} bytes; replace it"
            )
        return file.readall()


def _decode_data_uri(source: str, where: str) -> bytes:
    head, _, payload = source.partition(",")
    try:
        if not head.endswith(";base64"):
            raise ValueError("no ;base64 before the comma")
        return base64.b64decode(payload, validate=True)
    except (ValueError, binascii.Error) as error:
        raise ValueError(
            f"{where[:300]}: a data: URI must be data:…;base64,…, got {head[:60]!r} ({error}); "
            "encode the file anew"
        ) from error
