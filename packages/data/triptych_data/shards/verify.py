"""Every byte of a set of shards against the indexes: what is damaged, swapped, missing or extra."""

import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from triptych_data.shards.index import (
    IndexDamage,
    ShardIndex,
    checksum,
    index_paths,
    parse_columns,
    read_index,
)
from triptych_data.shards.locate import find_shards
from triptych_data.shards.reader import spans
from triptych_data.storage.local import open_plain
from triptych_data.storage.open import File, Location, Storage
from triptych_data.storage.remote import shown
from triptych_data.workers.ordered import in_order

NAMED = 20
"""Damaged samples named per shard; the rest is counted."""
MOST_REST = 1 << 28
"""Bytes of what is behind the last sample: an end marker and what belongs to no sample."""
NUMBERED = re.compile(r"(.*?)(\d+)\.tar")


class Problem(NamedTuple):
    """What is wrong with a file, in a word and in a sentence.

    `kind` is one of missing, extra, truncated, appended, flipped (bytes that differ), swapped (of
    another shard), duplicate, index (an index file that is damaged), unreadable.
    """

    kind: str
    path: str
    samples: tuple[str, ...]
    """keys of the samples that are damaged, the first NAMED of them"""
    message: str


@dataclass(slots=True)
class VerifyReport:
    """What `verify_shards` found; `ok` if nothing is wrong."""

    num_shards: int = 0
    num_samples: int = 0
    tar_bytes: int = 0
    num_damaged: int = 0
    """samples whose bytes are not those that were indexed"""
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"ok": self.ok, **asdict(self), "problems": [p._asdict() for p in self.problems]}

    def lines(self) -> Iterator[str]:
        """For people: one line a problem, then the sum."""
        for problem in self.problems:
            yield f"{problem.kind}: {problem.path}: {problem.message}"
        counted = (
            f"{self.num_shards:,} shards, {self.num_samples:,} samples, {self.tar_bytes:,} bytes"
        )
        if self.ok:
            yield f"{counted}: all as they were indexed"
        else:
            yield f"{counted}: {len(self.problems)} problems, {self.num_damaged:,} damaged samples"


def verify_shards(
    paths: str | Path | Sequence[str | Path],
    *,
    num_workers: int = 1,
    storage: Storage | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Check every byte of shards, named as for `Shards.open`, and that the set is whole.

    Of folders it also says which files belong to no shard, and which number is missing; a shard
    missing after the last one leaves no trace. Remote shards are read past the cache.
    `on_progress` is told (shards done, shards in all). Raises ValueError when a path finds nothing.
    """
    storage = replace(storage or Storage(), cache_bytes=0)
    paths = [paths] if isinstance(paths, str | Path) else paths
    report, tars, prints = VerifyReport(), find_shards(paths), dict[Location, str]()
    results = in_order(partial(check_shard, storage=storage), tars, num_workers)
    for done, (tar, result) in enumerate(zip(tars, results, strict=True), 1):
        report.num_shards += 1
        report.num_samples += result.num_samples
        report.tar_bytes += result.tar_bytes
        report.num_damaged += result.num_damaged
        report.problems += result.problems
        prints[tar] = result.fingerprint
        if on_progress:
            on_progress(done, len(tars))
    report.problems = _with_owners(report.problems, prints, storage)
    for folder in sorted({Path(path) for path in paths if Path(path).is_dir()}):
        report.problems += [*_gaps(folder), *_leftovers(folder)]
    return report


class ShardResult(NamedTuple):
    num_samples: int
    tar_bytes: int
    num_damaged: int
    fingerprint: str
    problems: list[Problem]


def check_shard(tar: Location, storage: Storage) -> ShardResult:
    """Read all of one shard; what is wrong is returned, not raised."""
    problems: list[Problem] = []
    try:
        index = read_index(tar, storage)
    except IndexDamage as error:
        path, _, message = str(error).partition(": ")
        problems.append(Problem(error.kind, path, (), message))
        try:
            columns = index_paths(tar)[1]
            index = parse_columns(storage.read_whole(columns), columns)
        except (IndexDamage, OSError):
            return ShardResult(0, 0, 0, "", problems)
    except (OSError, ValueError) as error:
        return ShardResult(0, 0, 0, "", [Problem("unreadable", shown(tar), (), str(error))])
    return _check_bytes(tar, index, storage, problems)


def _check_bytes(
    tar: Location, index: ShardIndex, storage: Storage, problems: list[Problem]
) -> ShardResult:
    bad: list[int] = []
    try:
        # Not mapped: a disk that cannot read a page must be a problem, not the end of the process.
        file = (
            open_plain(tar)
            if isinstance(tar, Path)
            else storage.open(tar, index.tar_bytes, index.fingerprint)
        )
        bad = list(_damaged(file, index))
        rest = _rest(file, index)
    except (OSError, ValueError) as error:
        problems.append(Problem("unreadable", shown(tar), (), str(error)))
        rest = True
    keys = tuple(index.key(row) for row in bad[:NAMED])
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        message = f"sample {keys[0]}{more} must be as indexed, got other bytes; restore the shard"
        problems.append(Problem("flipped", shown(tar), keys, message))
    if not rest and not any(problem.kind in ("truncated", "appended") for problem in problems):
        message = "the bytes outside of samples must be as indexed, got others; restore the shard"
        problems.append(Problem("flipped", shown(tar), (), message))
    return ShardResult(index.num_samples, index.tar_bytes, len(bad), index.fingerprint, problems)


def _damaged(file: File, index: ShardIndex) -> Iterator[int]:
    """Rows whose bytes have another checksum than the index says."""
    hashes = index.sample_hash.tolist()
    return (row for row, _, span in spans(file, index) if checksum(span) != hashes[row])


def _rest(file: File, index: ShardIndex) -> bool:
    """Whether the bytes before the first sample and after the last are as they were."""
    end = int(index.sample_start[-1])
    if index.tar_bytes - end > MOST_REST:  # an index that lies would fill the memory
        return False
    before = bytes(file.read(0, int(index.sample_start[0])))
    return checksum(before + bytes(file.read(end, index.tar_bytes - end))) == index.rest_hash


def _with_owners(
    problems: list[Problem], prints: dict[Location, str], storage: Storage
) -> list[Problem]:
    """The problems, those that come of files that changed places named as such."""
    named = [_name_owner(problem, list(prints), storage) for problem in problems]
    swapped = {problem.path for problem in named if problem.kind == "swapped"}
    kept = [p for p in dict.fromkeys(named) if p.kind == "swapped" or p.path not in swapped]
    damaged = {problem.path.removesuffix(".idx") for problem in kept}
    sound = {prints[tar]: tar for tar in reversed(prints) if shown(tar) not in damaged}
    for tar, fingerprint in prints.items():
        owner = sound.get(fingerprint, tar)
        if not fingerprint or owner == tar:
            continue
        if shown(tar) in damaged:
            columns, what = index_paths(tar)[1], f"must be its shard's, got that of {shown(owner)}"
            kept.append(Problem("swapped", shown(columns), (), f"{what}; restore it"))
        else:
            message = f"must hold samples of its own, got those of {shown(owner)}; remove one"
            kept.append(Problem("duplicate", shown(tar), (), message))
    return kept


def _name_owner(problem: Problem, tars: Sequence[Location], storage: Storage) -> Problem:
    """A problem of a local tar or `.idx` that is another shard's becomes "swapped"."""
    path = Path(problem.path)
    for tar in tars:
        offsets, columns = index_paths(tar)
        if problem.path in map(shown, (tar, offsets)) or not path.is_file():
            continue
        try:
            index = parse_columns(storage.read_whole(columns), columns)
            if path.suffix == ".idx":
                same = path.read_bytes() == index.sample_start.astype("<u8").tobytes()
            else:
                same = path.suffix == ".tar" and path.stat().st_size == index.tar_bytes
                same = same and next(_damaged(open_plain(path), index), None) is None
        except (OSError, ValueError):  # one more that is damaged
            continue
        if same:
            message = f"must be what its name says, got that of {shown(tar)}; put it back"
            return Problem("swapped", problem.path, (), message)
    return problem


def _gaps(folder: Path) -> Iterator[Problem]:
    """Numbers that are left out between shards whose names differ in a number only."""
    series: dict[tuple[str, int], set[int]] = defaultdict(set)
    for tar in folder.glob("*.tar"):
        if match := NUMBERED.fullmatch(tar.name):
            series[match[1], len(match[2])].add(int(match[2]))
    for (prefix, width), numbers in sorted(series.items()):
        missing = (number for number in range(max(numbers)) if number not in numbers)
        for number in itertools.islice(missing, NAMED):
            path = folder / f"{prefix}{number:0{width}d}.tar"
            message = f"must be there, as shards up to {max(numbers)} are, got none; restore it"
            yield Problem("missing", str(path), (), message)


def _leftovers(folder: Path) -> Iterator[Problem]:
    """Index files without a shard, and what a killed run left."""
    for path in sorted(folder.iterdir()):
        tar, index, _ = path.name.partition(".tar.")
        if index and path.suffix in (".idx", ".columns") and not (folder / f"{tar}.tar").exists():
            message = f"must belong to {tar}.tar, got no such shard; restore it, or remove this"
            yield Problem("extra", str(path), (), message)
        elif path.suffix == ".tmp" or path.name == ".partial":
            message = "must not be among finished shards, got the rest of a run; remove it"
            yield Problem("extra", str(path), (), message)
