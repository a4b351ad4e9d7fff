"""The index beside a shard: where each sample lies, what it measures, and what its bytes must be.

`<shard>.tar.idx` is Megatron-Energon's file: the offset of each sample's first header and the end
of the last sample, unsigned 64-bit little-endian. `<shard>.tar.columns` is one safetensors file
with our columns (`ShardIndex`). A change in either, or in the shard, does not pass unnoticed.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from triptych_data.probe import MediaInfo
from triptych_data.sample import KINDS

FORMAT = 2
"""Version of the columns file; a reader refuses any other."""
DTYPES = {
    "key_bytes": "<u1",
    "key_start": "<i8",
    "sample_start": "<i8",
    "sample_crc32": "<u4",
    "json_crc32": "<u4",
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

    Members of a sample are its JSON and then its media 0, 1, …, whatever their order in the tar.
    Starts have one entry more than rows, so row i spans `start[i]:start[i + 1]`.
    """

    key_bytes: np.ndarray
    """(bytes of all keys,) uint8, UTF-8, one key after another"""
    key_start: np.ndarray
    """(N + 1,) int64 into key_bytes"""
    sample_start: np.ndarray
    """(N + 1,) int64, byte offset of a sample's first header; the same numbers as in `.idx`"""
    sample_crc32: np.ndarray
    """(N,) uint32 over a sample's whole span, headers and padding included"""
    json_crc32: np.ndarray
    """(N,) uint32 over the content of a sample's JSON member"""
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
    fingerprint: str = field(default="")
    """sha256 over all of the above, in hex"""

    @property
    def num_samples(self) -> int:
        return len(self.sample_crc32)

    @property
    def media(self) -> MediaColumns:
        return MediaColumns(self.media_kind, self.media_size, self.media_frames, self.media_seconds)

    def key(self, sample: int) -> str:
        start, end = self.key_start[sample : sample + 2]
        return self.key_bytes[start:end].tobytes().decode("utf-8", "surrogateescape")


@dataclass(slots=True)
class IndexRows:
    """Collects one shard's index sample by sample, in the order of the tar."""

    keys: list[bytes] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    crcs: list[tuple[int, int]] = field(default_factory=list)
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
        """The sample that lies at `start`, with bytes `span`, JSON first among its members.

        A member is (offset of its content in the tar, size, suffix); `media` are in the order in
        which the text meets them.
        """
        offset, size, _ = members[0]
        json_crc32 = zlib.crc32(span[offset - start : offset - start + size])
        self.keys.append(key.encode("utf-8", "surrogateescape"))
        self.starts.append(start)
        self.crcs.append((zlib.crc32(span), json_crc32))
        self.members += members
        self.member_starts.append(len(self.members))
        self.text_bytes.append(text_bytes)
        self.media += media
        self.media_starts.append(len(self.media))

    def finish(self, end: int, tar_bytes: int) -> ShardIndex:
        """The index of a tar of `tar_bytes` bytes whose last sample ends at `end`."""
        suffixes = sorted({suffix for _, _, suffix in self.members})
        media = MediaColumns.of(self.media)
        columns = {
            "key_bytes": np.frombuffer(b"".join(self.keys), dtype=np.uint8),
            "key_start": np.cumsum([0, *map(len, self.keys)]),
            "sample_start": [*self.starts, end],
            "sample_crc32": [sample for sample, _ in self.crcs],
            "json_crc32": [json_ for _, json_ in self.crcs],
            "member_offset": [offset for offset, _, _ in self.members],
            "member_size": [size for _, size, _ in self.members],
            "member_suffix": [suffixes.index(suffix) for _, _, suffix in self.members],
            "member_start": self.member_starts,
            "text_bytes": self.text_bytes,
            "media_kind": media.kind,
            "media_size": media.size,
            "media_frames": media.frames,
            "media_seconds": media.seconds,
            "media_start": self.media_starts,
        }
        arrays = {name: np.asarray(columns[name], dtype=dtype) for name, dtype in DTYPES.items()}
        return _sealed(arrays, tuple(suffixes), tar_bytes)


def index_paths(tar: str | Path) -> tuple[Path, Path]:
    """Where the index of `tar` lies: the `.idx` and the `.columns` file."""
    return Path(f"{tar}.idx"), Path(f"{tar}.columns")


def write_index(tar: str | Path, index: ShardIndex) -> None:
    """Write both index files of `tar`, each whole or not at all; equal indexes give equal bytes."""
    offsets, columns = index_paths(tar)
    # safetensors orders several metadata keys at random, so there is one.
    metadata = {
        "format": FORMAT,
        "tar_bytes": index.tar_bytes,
        "num_samples": index.num_samples,
        "suffixes": index.suffixes,
        "fingerprint": index.fingerprint,
    }
    arrays = {name: np.ascontiguousarray(getattr(index, name)) for name in DTYPES}
    write_whole(columns, save(arrays, metadata={"triptych": json.dumps(metadata)}))
    write_whole(offsets, index.sample_start.astype("<u8").tobytes())


def write_whole(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, bring it to the disk, then give it its name."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_index(tar: str | Path) -> ShardIndex:
    """The index beside `tar`, checked against itself, its `.idx` and the size of the tar.

    Raises ValueError when a file is missing, damaged, or belongs to another shard. The bytes of
    the samples are checked when they are read (`Shards.read`).
    """
    offsets, columns = index_paths(tar)
    for path in (Path(tar), offsets, columns):
        if not path.is_file():
            raise ValueError(
                f"{path}: a shard must have its index beside it, got no such file; "
                f"run: triptych-data index {tar}"
            )
    index = _load_columns(columns)
    if offsets.read_bytes() != index.sample_start.astype("<u8").tobytes():
        raise _stale(offsets, "must hold the offsets of the .columns file", "others", tar)
    size = Path(tar).stat().st_size
    if size != index.tar_bytes:
        raise _stale(tar, f"must have the {index.tar_bytes} bytes of its index", f"{size}", tar)
    return index


def _load_columns(path: Path) -> ShardIndex:
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = json.loads((file.metadata() or {})["triptych"])
            if metadata["format"] != FORMAT:
                raise _stale(path, f"must be of format {FORMAT}", metadata["format"], _tar_of(path))
            arrays = {name: file.get_tensor(name) for name in DTYPES}
        index = _sealed(arrays, tuple(metadata["suffixes"]), metadata["tar_bytes"])
        sound = index.fingerprint == metadata["fingerprint"]
        sound = sound and index.num_samples == metadata["num_samples"] and _consistent(index)
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise _stale(path, "must be a whole index", repr(error), _tar_of(path)) from error
    if not sound:
        raise _stale(path, "must fit its fingerprint", "other content", _tar_of(path))
    return index


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
    lengths = {len(index.json_crc32), len(index.text_bytes), len(index.sample_start) - 1}
    media = {len(index.media_size), len(index.media_frames), len(index.media_seconds)}
    ends = index.member_offset + index.member_size
    return bool(
        whole
        and lengths == {n}
        and media == {len(index.media_kind)}
        and n > 0
        and (np.diff(index.sample_start) > 0).all()
        and (np.diff(index.member_start) > 0).all()
        and index.member_offset.min() >= 0
        and ends.max() <= index.sample_start[-1] <= index.tar_bytes
    )


def _sealed(arrays: dict[str, np.ndarray], suffixes: tuple[str, ...], tar_bytes: int) -> ShardIndex:
    """A ShardIndex with its fingerprint: equal for equal content on every machine."""
    digest = hashlib.sha256(json.dumps([FORMAT, tar_bytes, suffixes]).encode())
    for name, dtype in DTYPES.items():
        array = arrays[name]
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).astype(dtype).tobytes())
    return ShardIndex(
        **arrays, suffixes=suffixes, tar_bytes=tar_bytes, fingerprint=digest.hexdigest()
    )


def _tar_of(columns: Path) -> str:
    return str(columns).removesuffix(".columns")


def _stale(path: str | Path, must: str, got: object, tar: str | Path) -> ValueError:
    return ValueError(
        f"{path}: {must}, got {got}; restore the shard and its index, or, if the shard is meant to "
        f"have changed, run: triptych-data index --overwrite {tar}"
    )


assert [f.name for f in fields(ShardIndex)][: len(DTYPES)] == list(DTYPES)
