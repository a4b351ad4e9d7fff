"""Samples of indexed shards copied into other shards: of another size, order, or a choice of them.

Nothing is encoded again: a sample's bytes in the tar are copied as they are, each checked against
its index. What a killed run has written is kept; the same call goes on from there.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from triptych_data.media.probe import MediaInfo
from triptych_data.sample import KINDS
from triptych_data.shards.index import ShardIndex, checksum
from triptych_data.shards.reader import Shards
from triptych_data.shards.report import Progress, ShardReport
from triptych_data.shards.staging import staging
from triptych_data.shards.tar import BLOCK
from triptych_data.shards.tarwriter import TarWriter, chat_names, cut, kept_index
from triptych_data.shards.write import SHARD_SIZE, shuffled
from triptych_data.workers.ordered import in_order


def reshard(
    inputs: Sequence[str | Path],
    output_dir: str | Path,
    *,
    shard_size: int = SHARD_SIZE,
    samples_per_shard: int | None = None,
    shuffle_seed: int | None = None,
    num_samples: int | None = None,
    keys: Path | None = None,
    without_keys: Path | None = None,
    rekey: bool = False,
    num_workers: int = 1,
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> ShardReport:
    """Copy samples of `inputs`, in their order or shuffled, as `shards.write_shards` writes them.

    `keys` and `without_keys` are files of keys, one a line: only these samples, all but these.
    `num_samples` takes the first of the order. Keys stay, or with `rekey` number the samples.

    Raises ValueError for keys that repeat without `rekey`, keys in a file that no sample has,
    inputs of different layouts, and damaged samples.
    """
    opened, output = Shards.open(inputs), Path(output_dir)
    _check_inputs(opened, output)
    chosen = _chosen(opened, keys, without_keys, rekey)
    if shuffle_seed is not None:
        chosen = chosen[shuffled(len(chosen), shuffle_seed)]
    chosen = chosen[:num_samples]
    sizes = np.concatenate([_sizes(index, rekey) for index in opened.indexes])[chosen]
    starts = cut(sizes, shard_size, samples_per_shard).tolist()
    run = {
        "version": 1,
        "inputs": opened.fingerprint,
        "samples": hashlib.sha256(chosen.astype("<i8").tobytes()).hexdigest(),
        "shards": hashlib.sha256(np.array(starts, dtype="<i8").tobytes()).hexdigest(),
        "rekey": rekey,
    }
    report = ShardReport()
    with staging(output, run, overwrite=overwrite) as place:
        jobs = [
            _Job(place.shards / f"shard-{number:06d}.tar", chosen[a:b], sizes[a:b], a)
            for number, (a, b) in enumerate(pairwise(starts))
        ]
        work = Copier(opened, rekey).write
        with closing(in_order(work, [] if place.publishing else jobs, num_workers)) as results:
            for done, kept in enumerate(results, 1):
                report.kept_shards += kept
                if on_progress:
                    on_progress("Copying", done, len(jobs))
        report.shards = place.publish()
    report.count()
    return report


class _Job(NamedTuple):
    """One shard to write: samples by number, their bytes in the tar, the first one's new key."""

    path: Path
    samples: np.ndarray
    sizes: np.ndarray
    first_key: int


@dataclass(frozen=True, slots=True)
class Copier:
    """Writes shards of `shards`' samples, in any process."""

    shards: Shards
    rekey: bool

    def write(self, job: _Job) -> bool:
        """Write one shard; returns whether it was there already, as it would be written."""
        numbers = job.samples.tolist()

        def key(number: int) -> str:
            if self.rekey:
                return f"{job.first_key + number:09d}"
            return self.shards.keys(numbers[number])

        if kept_index(job.path, job.sizes, key):
            return True
        with TarWriter(job.path) as tar:
            for number, sample in enumerate(numbers):
                self._copy(tar, sample, key(number))
            tar.finish(self.shards.indexes[0].layout)
        return False

    def _copy(self, tar: TarWriter, sample: int, key: str) -> None:
        shard = bisect_right(self.shards.sample_start, sample) - 1
        index, row = self.shards.indexes[shard], sample - int(self.shards.sample_start[shard])
        media, text_bytes = _measures(self.shards, sample), int(index.text_bytes[row])
        if self.rekey:
            suffixes = index.names(row)
            names = chat_names(suffixes) if index.layout == "chat" else suffixes
            contents = self.shards.read_members(sample)
            tar.add_members(key, names, suffixes, contents, media, text_bytes)
            return
        first, last = index.member_start[row : row + 2].tolist()
        shift = tar.end - int(index.sample_start[row])
        offsets = (index.member_offset[first:last] + shift).tolist()
        sizes = index.member_size[first:last].tolist()
        members = list(zip(offsets, sizes, index.names(row), strict=True))
        tar.add_span(key, self.shards.read_span(sample), members, media, text_bytes)


def _check_inputs(opened: Shards, output: Path) -> None:
    layouts = {index.layout for index in opened.indexes}
    if len(layouts) > 1:
        raise ValueError(
            f"{opened.paths[0]}: shards must all hold chats or all other members, got both; "
            "make chats of the others first with: triptych-data shard"
        )
    inside = [path for path in opened.paths if Path(path).resolve().parent == output.resolve()]
    if inside:
        raise ValueError(
            f"{output}: the output must be another folder than the inputs', got {inside[0]} in it; "
            "name a new folder"
        )


def _chosen(
    opened: Shards, keys: Path | None, without_keys: Path | None, rekey: bool
) -> np.ndarray:
    """The numbers (n,) int64 of the samples to copy, ascending."""
    if rekey and not keys and not without_keys:
        return np.arange(opened.num_samples)
    hashes = _hashed([opened.keys(i) for i in range(opened.num_samples)])
    chosen = np.ones(len(hashes), dtype=bool)
    for path, wanted in ((keys, True), (without_keys, False)):
        if path:
            chosen &= np.isin(hashes, _hashes(path, hashes)) == wanted
    numbers = np.flatnonzero(chosen)
    if not len(numbers):
        raise ValueError(
            f"{keys or without_keys}: must leave a sample to copy, got none; check the keys"
        )
    _, counts = np.unique(hashes[numbers], return_counts=True)
    if not rekey and counts.max() > 1:
        twice = hashes[numbers] == np.unique(hashes[numbers])[np.argmax(counts)]
        first, second = numbers[twice][:2].tolist()
        raise ValueError(
            f"{opened.where(second)}: a key must be unique, got that of {opened.where(first)}; "
            "number the samples anew with --rekey"
        )
    return numbers


def _hashes(path: Path, known: np.ndarray) -> np.ndarray:
    """Hashes of the keys that a file lists. Raises ValueError for one that no sample has."""
    try:
        keys = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: must be a text of keys, one a line, got {error}; check the path"
        ) from error
    hashes = _hashed(keys)
    missing = np.flatnonzero(~np.isin(hashes, known)).tolist()
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(
            f"{path}: each key must be one of the shards', got {keys[missing[0]]!r}{more} that no "
            "sample has; check that keys and shards belong together"
        )
    return hashes


def _hashed(keys: list[str]) -> np.ndarray:
    hashes = [checksum(key.encode("utf-8", "surrogateescape")) for key in keys]
    return np.array(hashes, dtype=np.uint64)


def _sizes(index: ShardIndex, rekey: bool) -> np.ndarray:
    """Bytes (N,) int64 that each sample of a shard will take in a new one."""
    if not rekey:
        return np.diff(index.sample_start)
    blocks = BLOCK + -(-index.member_size // BLOCK) * BLOCK
    return np.add.reduceat(blocks, index.member_start[:-1])


def _measures(shards: Shards, sample: int) -> list[MediaInfo]:
    """What the index says of a sample's media, as it was measured."""
    columns = shards.media_of(sample)
    return [
        MediaInfo(KINDS[kind], "", width, height, frames, seconds)
        for kind, (width, height), frames, seconds in zip(
            columns.kind.tolist(),
            columns.size.tolist(),
            columns.frames.tolist(),
            columns.seconds.tolist(),
            strict=True,
        )
    ]
