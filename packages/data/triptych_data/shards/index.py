"""The index beside a shard: where each sample lies, what it measures, and what its bytes must be.

`<shard>.tar.idx` is Megatron-Energon's file: the offset of each sample's first header and the end
of the last sample, unsigned 64-bit little-endian. `<shard>.tar.columns` is one safetensors file
with our columns (`ShardIndex`). A change in either, or in the shard, does not pass unnoticed: the
columns hold a checksum of every byte of the shard, and a fingerprint of themselves.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save
from xxhash import xxh3_64_intdigest as checksum

from triptych_data.media.probe import MediaInfo
from triptych_data.sample import KINDS
from triptych_data.shards.tar import END
from triptych_data.storage.open import Location, Storage
from triptych_data.storage.remote import shown

FORMAT = 2
"""Version of the columns file; a reader refuses any other."""
Layout = Literal["chat", "members"]
"""What a shard holds: our samples, or any files grouped by key, as other WebDataset tars do."""
DTYPES = {
    "key_bytes": "<u1",
    "key_start": "<i8",
    "sample_start": "<i8",
    "sample_hash": "<u8",
    "json_hash": "<u8",
    "member_offset": "<i8",
    "member_size": "<i8",
    "member_suffix": "<u1",
    "member_start": "<i8",
    "text_bytes": "<i8",
    "media_kind": "<u1",
    "media_size": "<i4",
    "media_frames": "<i4",
    "media_seconds": "<f8",
    "media_start": "<i8",
}


class MediaColumns(NamedTuple):
    """What K media measure, a row each."""

    kind: np.ndarray
    """(K,) uint8 into `sample.KINDS`: 0 image, 1 video, 2 audio"""
    size: np.ndarray
    """(K, 2) int32, width and height in pixels as it will be seen, turned; 0 for audio"""
    frames: np.ndarray
    """(K,) int32, frames of a video; 0 for others"""
    seconds: np.ndarray
    """(K,) float64, duration of a video or audio; 0 for images"""

    def rows(self, first: int, last: int) -> "MediaColumns":
        return MediaColumns(*(column[first:last] for column in self))

    def counts(self) -> np.ndarray:
        """(len(KINDS),) media of each kind, the sound of videos among them where there is some."""
        is_silent = (self.kind == KINDS.index("audio")) & (self.seconds == 0)
        return np.bincount(self.kind[~is_silent], minlength=len(KINDS))

    @classmethod
    def joined(cls, tables: Sequence["MediaColumns"]) -> "MediaColumns":
        return cls(*(np.concatenate(columns) for columns in zip(*tables, strict=True)))

    @classmethod
    def of(cls, media: Sequence[MediaInfo]) -> "MediaColumns":
        return cls(
            np.array([KINDS.index(info.kind) for info in media], dtype=np.uint8),
            np.array([info[2:4] for info in media], dtype=np.int32).reshape(-1, 2),
            np.array([info.frames for info in media], dtype=np.int32),
            np.array([info.seconds for info in media], dtype=np.float64),
        )


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """One shard's columns: N samples, M members, K media as the texts meet them.

    Members of a chat are its JSON and then its media 0, 1, …, whatever their order in the tar; in
    the layout "members" they are in the order of the tar, and there are no media columns.
    Checksums are XXH3-64: at 42 kB it takes 1 µs where CRC-32 takes 8 to 40, by the machine.
    Starts have one entry more than rows, so row i spans `start[i]:start[i + 1]`.
    """

    key_bytes: np.ndarray
    """(bytes of all keys,) uint8, UTF-8, one key after another"""
    key_start: np.ndarray
    """(N + 1,) int64 into key_bytes"""
    sample_start: np.ndarray
    """(N + 1,) int64, byte offset of a sample's first header; the same numbers as in `.idx`"""
    sample_hash: np.ndarray
    """(N,) uint64, XXH3 of a sample's whole span, headers and padding included"""
    json_hash: np.ndarray
    """(N,) uint64, XXH3 of the content of a sample's first member, its JSON if it has one"""
    member_offset: np.ndarray
    """(M,) int64, byte offset of a member's content in the tar"""
    member_size: np.ndarray
    """(M,) int64, bytes of a member's content"""
    member_suffix: np.ndarray
    """(M,) uint8 into suffixes"""
    member_start: np.ndarray
    """(N + 1,) int64 into the member columns"""
    text_bytes: np.ndarray
    """(N,) int64, UTF-8 bytes of a sample's text"""
    media_kind: np.ndarray
    media_size: np.ndarray
    media_frames: np.ndarray
    media_seconds: np.ndarray
    """the columns of `MediaColumns`"""
    media_start: np.ndarray
    """(N + 1,) int64 into the media columns"""
    suffixes: tuple[str, ...]
    """what member_suffix counts: "json", "jpg", …"""
    tar_bytes: int
    """size of the shard"""
    rest_hash: int
    """XXH3 of the bytes before the first sample and after the last, joined"""
    layout: Layout
    fingerprint: str = field(default="")
    """sha256 over all of the above, in hex"""

    @property
    def num_samples(self) -> int:
        return len(self.sample_hash)

    @property
    def media(self) -> MediaColumns:
        return MediaColumns(self.media_kind, self.media_size, self.media_frames, self.media_seconds)

    def names(self, sample: int) -> list[str]:
        """The suffixes of a sample's members, in their order: "json", "0.jpg" or "jpg", …"""
        first, last = self.member_start[sample : sample + 2]
        return [self.suffixes[i] for i in self.member_suffix[first:last].tolist()]

    def key(self, sample: int) -> str:
        start, end = self.key_start[sample : sample + 2]
        return self.key_bytes[start:end].tobytes().decode("utf-8", "surrogateescape")


@dataclass(slots=True)
class IndexRows:
    """Collects one shard's index sample by sample, in the order of the tar."""

    keys: list[bytes] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    hashes: list[tuple[int, int]] = field(default_factory=list)
    members: list[tuple[int, int, str]] = field(default_factory=list)
    member_starts: list[int] = field(default_factory=lambda: [0])
    text_bytes: list[int] = field(default_factory=list)
    media: list[MediaInfo] = field(default_factory=list)
    media_starts: list[int] = field(default_factory=lambda: [0])

    def add(
        self,
        key: str,
        span: memoryview | bytes,
        members: list[tuple[int, int, str]],
        text_bytes: int,
        media: list[MediaInfo],
        start: int,
    ) -> None:
        """The sample that lies at `start`, with bytes `span`; a chat's first member is its JSON.

        A member is (offset of its content in the tar, size, suffix); `media` are in the order in
        which the text meets them. A video whose sound is heard is followed by a row for that.
        """
        offset, size, _ = members[0]
        first = memoryview(span)[offset - start : offset - start + size]
        self.keys.append(key.encode("utf-8", "surrogateescape"))
        self.starts.append(start)
        self.hashes.append((checksum(span), checksum(first)))
        self.members += members
        self.member_starts.append(len(self.members))
        self.text_bytes.append(text_bytes)
        for info in media:
            self.media.append(info)
            if info.sound is not None:
                self.media.append(MediaInfo("audio", "", seconds=info.sound))
        self.media_starts.append(len(self.media))

    def finish(
        self, end: int, tar_bytes: int, *, rest: bytes = END, layout: Layout = "chat"
    ) -> ShardIndex:
        """The index of a tar of `tar_bytes` bytes whose last sample ends at `end`.

        `rest` is what lies before the first sample and after the last.
        """
        suffixes = sorted({suffix for _, _, suffix in self.members})
        number = {suffix: i for i, suffix in enumerate(suffixes)}
        media = MediaColumns.of(self.media)
        columns = {
            "key_bytes": np.frombuffer(b"".join(self.keys), dtype=np.uint8),
            "key_start": np.cumsum([0, *map(len, self.keys)]),
            "sample_start": [*self.starts, end],
            "sample_hash": [sample for sample, _ in self.hashes],
            "json_hash": [json_ for _, json_ in self.hashes],
            "member_offset": [offset for offset, _, _ in self.members],
            "member_size": [size for _, size, _ in self.members],
            "member_suffix": [number[suffix] for _, _, suffix in self.members],
            "member_start": self.member_starts,
            "text_bytes": self.text_bytes,
            "media_kind": media.kind,
            "media_size": media.size,
            "media_frames": media.frames,
            "media_seconds": media.seconds,
            "media_start": self.media_starts,
        }
        arrays = {name: np.asarray(columns[name], dtype=dtype) for name, dtype in DTYPES.items()}
        return _sealed(arrays, _Facts(tuple(suffixes), tar_bytes, checksum(rest), layout))


class IndexDamage(ValueError):
    """An index, or a shard beside it, that cannot be right; `kind` says in a word what is wrong."""

    def __init__(self, message: str, kind: str = "index") -> None:
        super().__init__(message)
        self.kind = kind


def index_paths(tar: Location) -> tuple[Location, Location]:
    """Where the index of `tar` lies: the `.idx` and the `.columns` file; URLs keep their query."""
    if isinstance(tar, Path):
        return tar.with_name(f"{tar.name}.idx"), tar.with_name(f"{tar.name}.columns")
    path, mark, query = tar.partition("?")
    return f"{path}.idx{mark}{query}", f"{path}.columns{mark}{query}"


def write_index(tar: Path, index: ShardIndex) -> None:
    """Write both index files of `tar`, each whole or not at all; equal indexes give equal bytes."""
    offsets, columns = index_paths(tar)
    # safetensors orders several metadata keys at random, so there is one.
    metadata = {
        "format": FORMAT,
        "tar_bytes": index.tar_bytes,
        "num_samples": index.num_samples,
        "suffixes": index.suffixes,
        "rest_hash": index.rest_hash,
        "layout": index.layout,
        "fingerprint": index.fingerprint,
    }
    arrays = {name: np.ascontiguousarray(getattr(index, name)) for name in DTYPES}
    write_whole(Path(columns), save(arrays, metadata={"triptych": json.dumps(metadata)}))
    write_whole(Path(offsets), index.sample_start.astype("<u8").tobytes())


def write_whole(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, bring it to the disk, then give it its name."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_index(tar: Location, storage: Storage | None = None) -> ShardIndex:
    """The index beside `tar`, checked against itself, its `.idx` and the size of the tar.

    Raises IndexDamage, a ValueError, when a file is missing, damaged, or belongs to another shard.
    The bytes of the samples, and the size of a remote tar, are checked when they are read
    (`Shards.read`).
    """
    storage = storage or Storage()
    try:
        return _read_index(tar, storage, fresh=False)
    except IndexDamage as error:
        if isinstance(tar, Path) or error.kind == "missing":
            raise
        return _read_index(tar, storage, fresh=True)  # the disk of the cache may be damaged


def _read_index(tar: Location, storage: Storage, *, fresh: bool) -> ShardIndex:
    offsets, columns = index_paths(tar)
    try:
        index = parse_columns(storage.read_whole(columns, fresh=fresh), columns)
        starts = storage.read_whole(offsets, fresh=fresh)
        size = index.tar_bytes if isinstance(tar, str) else tar.stat().st_size
    except FileNotFoundError as error:
        raise IndexDamage(
            f"{error.filename}: a shard must have its index beside it, got no such file; "
            f"run: triptych-data index {shown(tar)}",
            "missing",
        ) from error
    if starts != index.sample_start.astype("<u8").tobytes():
        raise _stale(offsets, "must hold the offsets of the .columns file", "others", tar)
    if size != index.tar_bytes:
        kind = "truncated" if size < index.tar_bytes else "appended"
        must = f"must have the {index.tar_bytes} bytes of its index"
        raise _stale(tar, must, f"{size}", tar, kind)
    return index


def parse_columns(data: bytes, path: Location) -> ShardIndex:
    """The content of the `.columns` file at `path`. Raises IndexDamage."""
    tar = str(path).replace(".columns", "")
    try:
        arrays = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata = json.loads(header["__metadata__"]["triptych"])
        if metadata["format"] != FORMAT:
            raise _stale(path, f"must be of format {FORMAT}", metadata["format"], tar)
        facts = _Facts(*(metadata[name] for name in _Facts._fields))
        index = _sealed(arrays, facts._replace(suffixes=tuple(facts.suffixes)))
        sound = index.fingerprint == metadata["fingerprint"]
        sound = sound and index.num_samples == metadata["num_samples"] and _consistent(index)
    except (SafetensorError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _stale(path, "must be a whole index", repr(error), tar) from error
    except ValueError as error:
        if isinstance(error, IndexDamage):
            raise
        raise _stale(path, "must be a whole index", repr(error), tar) from error
    if not sound:
        raise _stale(path, "must fit its fingerprint", "other content", tar)
    return index


class _Facts(NamedTuple):
    """What an index holds besides columns, in the order of `ShardIndex`."""

    suffixes: tuple[str, ...]
    tar_bytes: int
    rest_hash: int
    layout: Layout


def _consistent(index: ShardIndex) -> bool:
    """Whether rows, starts and offsets fit each other: a guard against files of other code."""
    n = index.num_samples
    starts = {
        "key_start": len(index.key_bytes),
        "member_start": len(index.member_offset),
        "media_start": len(index.media_kind),
    }
    whole = all(
        len(start := getattr(index, name)) == n + 1
        and start[0] == 0
        and start[-1] == rows
        and bool((np.diff(start) >= 0).all())
        for name, rows in starts.items()
    )
    lengths = {len(index.json_hash), len(index.text_bytes), len(index.sample_start) - 1}
    media = {len(index.media_size), len(index.media_frames), len(index.media_seconds)}
    members = {len(index.member_size), len(index.member_suffix)}
    return bool(
        whole
        and lengths == {n}
        and media == {len(index.media_kind)}
        and members == {len(index.member_offset)}
        and n > 0
        and index.sample_start[0] >= 0
        and (np.diff(index.sample_start) > 0).all()
        and index.sample_start[-1] <= index.tar_bytes
        and (np.diff(index.member_start) > 0).all()
        and _members_inside(index)
        and index.member_suffix.max() < len(index.suffixes)
        and all("/" not in suffix and ".." not in suffix for suffix in index.suffixes)
        and index.layout in get_args(Layout)
    )


def _members_inside(index: ShardIndex) -> bool:
    """Whether each member's content lies within its sample."""
    counts = np.diff(index.member_start)
    start = np.repeat(index.sample_start[:-1], counts)
    end = np.repeat(index.sample_start[1:], counts)
    inside = (start <= index.member_offset) & (index.member_offset <= end)
    fits = (index.member_size >= 0) & (index.member_size <= end - index.member_offset)
    return bool((inside & fits).all())


def _sealed(arrays: dict[str, np.ndarray], facts: _Facts) -> ShardIndex:
    """A ShardIndex with its fingerprint: equal for equal content on every machine."""
    digest = hashlib.sha256(json.dumps([FORMAT, *facts]).encode())
    for name, dtype in DTYPES.items():
        array = arrays[name]
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).astype(dtype).tobytes())
    columns: dict[str, Any] = {name: arrays[name] for name in DTYPES}
    return ShardIndex(**columns, **facts._asdict(), fingerprint=digest.hexdigest())


def _stale(
    path: Location, must: str, got: object, tar: Location, kind: str = "index"
) -> IndexDamage:
    return IndexDamage(
        f"{shown(path)}: {must}, got {got}; restore the shard and its index, or, if the shard is "
        f"meant to have changed, run: triptych-data index --overwrite {shown(tar)}",
        kind,
    )


assert [f.name for f in fields(ShardIndex)][: len(DTYPES)] == list(DTYPES)
