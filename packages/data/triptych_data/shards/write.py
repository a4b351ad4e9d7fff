"""Write shards from any input: numbered, indexed, the same bytes for any number of workers.

Two passes, both by any number of processes: the first checks every record and measures it, so that
where each shard begins is known; then each shard is written by itself. What a killed run has
checked and written is kept; the same call goes on from there.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from triptych_data.plan.permutation import permute, stream_key
from triptych_data.sample import KINDS
from triptych_data.shards.checked import Checked
from triptych_data.shards.index import write_whole
from triptych_data.shards.intake import BAD, MEASURES, Intake, Rejected
from triptych_data.shards.mapping import Mapping
from triptych_data.shards.report import Progress, ShardReport
from triptych_data.shards.staging import CHECKED, SKIPPED, staging
from triptych_data.shards.tar import END
from triptych_data.shards.tarwriter import TarWriter, cut, kept_index
from triptych_data.sources.kinds import find_inputs, identity, open_inputs
from triptych_data.workers.ordered import in_order

SHARD_SIZE = 256_000_000
MOST_AT_ONCE = 256
"""Records of one job of checking: a second of decoding images, so that progress shows."""


@dataclass(frozen=True, slots=True)
class ShardOptions:
    """How `write_shards` works; what is not about processes and faults decides the bytes.

    A shard is full when the next sample would take it beyond `shard_size` bytes, or at
    `samples_per_shard`. `max_bad` is how many bad records may be left out, a share of all of them
    if it is below 1; 0 stops at the first. See `intake.Intake` for the rest.
    """

    shard_size: int = SHARD_SIZE
    samples_per_shard: int | None = None
    shuffle_seed: int | None = None
    mapping: Mapping = field(default_factory=Mapping)
    kind: str | None = None
    media_root: Path | None = None
    allow_outside: bool = False
    decode: bool = True
    hear_videos: bool = False
    max_bad: float = 0
    num_workers: int = 1

    def __post_init__(self) -> None:
        numbers = (self.shard_size, self.samples_per_shard, self.num_workers)
        if any(number is not None and number < 1 for number in numbers):
            raise ValueError(
                "shard size, samples per shard and workers must be at least 1, got "
                f"{', '.join(map(str, numbers))}; leave out what you do not need"
            )


def write_shards(
    inputs: str | Path | Sequence[str | Path],
    output_dir: str | Path,
    *,
    overwrite: bool = False,
    on_progress: Progress | None = None,
    **options: Any,
) -> ShardReport:
    """Check the records of any input (`sources.kinds`) and write them, media included, as shards.

    `options` are those of `ShardOptions`. Keys number the written samples. Raises ValueError at
    the first bad record, or beyond `max_bad` of them; what was left out is in `skipped.jsonl`.
    Nothing appears in `output_dir` before all is written.
    """
    settings = ShardOptions(**options)
    found = find_inputs(_listed(inputs), settings.kind)
    report = ShardReport()
    with staging(Path(output_dir), _run(found, settings), overwrite=overwrite) as place:
        if not place.publishing:
            intake = _intake(found, place.scratch, settings)
            order, checked = _check(intake, place.folder, settings, report, on_progress)
            jobs = _jobs(order, checked, settings, place.shards)
            _write(intake, jobs, settings.num_workers, report, on_progress)
            lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in _listing(report)]
            if lines:
                write_whole(place.shards / SKIPPED, "".join(lines).encode())
        report.shards = place.publish()
    report.count()
    return report


def check_records(
    inputs: str | Path | Sequence[str | Path],
    *,
    on_progress: Progress | None = None,
    **options: Any,
) -> ShardReport:
    """What `write_shards` would write of these inputs, every record checked, nothing written.

    `shards` holds the names. Raises as `write_shards`.
    """
    settings = ShardOptions(**options)
    found = find_inputs(_listed(inputs), settings.kind)
    report = ShardReport()
    with tempfile.TemporaryDirectory(prefix="triptych-") as name:
        folder = Path(name)
        intake = _intake(found, folder / "scratch", settings)
        order, checked = _check(intake, folder, settings, report, on_progress)
        jobs = _jobs(order, checked, settings, Path())
        good = checked[checked[:, 0] != BAD]
        report.shards = [job.path for job in jobs]
        report.num_samples = len(good)
        sums = dict(zip(MEASURES, good.sum(axis=0).tolist(), strict=True))
    report.num_images, report.num_videos, report.num_audios = (sums[f"{kind}s"] for kind in KINDS)
    report.text_bytes = sums["text_bytes"]
    report.tar_bytes = sums["tar_bytes"] + len(END) * len(report.shards)
    return report


class _Job(NamedTuple):
    """One shard to write: its rows, their bytes in the tar, the number of its first key."""

    path: Path
    rows: np.ndarray
    sizes: np.ndarray
    first_key: int

    def key(self, number: int) -> str:
        return f"{self.first_key + number:09d}"


def write_shard(intake: Intake, job: _Job) -> bool:
    """Write one shard; returns whether it was there already, whole and as it would be written."""
    if kept_index(job.path, job.sizes, job.key):
        return True
    with TarWriter(job.path) as tar:
        pairs = zip(job.rows.tolist(), job.sizes.tolist(), strict=True)
        for number, (row, size) in enumerate(pairs):
            sample = intake.prepare(row, decode=False)
            if sample.tar_bytes != size:
                raise ValueError(
                    f"{intake.rows.where(row)}: a record and its media must stay as they were "
                    f"checked, got {sample.tar_bytes} bytes instead of {size}; do not change them "
                    "during a run, begin anew with --overwrite"
                )
            tar.add(job.key(number), sample.json, sample.media, sample.measures, sample.text_bytes)
        tar.finish()
    return False


def shuffled(count: int, seed: int) -> np.ndarray:
    """The numbers from 0 to count - 1, (count,) int64, in an order that the seed gives."""
    return permute(np.arange(count), count, stream_key(seed, "shards"))


def _listed(inputs: str | Path | Sequence[str | Path]) -> Sequence[str | Path]:
    return [inputs] if isinstance(inputs, str | Path) else inputs


def _run(found: list[tuple[Path, str]], settings: ShardOptions) -> dict[str, Any]:
    """What decides the bytes: a run goes on only where all of it is the same."""
    free = ("max_bad", "num_workers", "kind")
    decides = {name: value for name, value in asdict(settings).items() if name not in free}
    root = settings.media_root
    return {
        "version": 1,
        "inputs": identity(found),
        **decides,
        "media_root": str(root.resolve()) if root else None,
    }


def _intake(found: list[tuple[Path, str]], scratch: Path, settings: ShardOptions) -> Intake:
    scratch.mkdir(exist_ok=True)
    rows = open_inputs(found, scratch, any_order=settings.shuffle_seed is not None)
    return Intake(
        rows,
        settings.mapping,
        settings.media_root,
        settings.allow_outside,
        settings.decode,
        settings.hear_videos,
    )


def _check(
    intake: Intake,
    folder: Path,
    settings: ShardOptions,
    report: ShardReport,
    on_progress: Progress | None,
) -> tuple[np.ndarray, np.ndarray]:
    """The order of all rows (N,) and what each measures (N, len(MEASURES)), in that order."""
    total, seed = len(intake.rows), settings.shuffle_seed
    order = np.arange(total) if seed is None else shuffled(total, seed)
    limit = settings.max_bad if settings.max_bad >= 1 else int(settings.max_bad * total)
    checked = Checked(folder / CHECKED, len(MEASURES))
    report.kept_records = checked.count
    _refuse_bad(checked.rejected, limit, total)
    workers = min(settings.num_workers, total // 8)  # a process costs what 100 records do
    most = max(8, min(MOST_AT_ONCE, total // (4 * max(workers, 1))))
    starts = intake.rows.pieces(most) if seed is None else np.arange(0, total, most)
    bounds = np.unique([checked.count, *starts[starts > checked.count].tolist(), total])
    jobs = [order[start:end] for start, end in pairwise(bounds.tolist())]
    with closing(in_order(intake.measure, jobs, workers)) as results, closing(checked):
        for table, rejected in results:
            _refuse_bad([*checked.rejected, *rejected], limit, total)
            checked.add(table, rejected)
            if on_progress:
                on_progress("Checking", checked.count, total)
    report.skipped = sorted(checked.rejected)
    return order, checked.table()


def _refuse_bad(rejected: list[Rejected], limit: float, total: int) -> None:
    if len(rejected) <= limit:
        return
    if limit == 0:
        raise ValueError(rejected[0].error)
    reasons = Counter(entry.reason for entry in rejected).most_common(3)
    listed = "; ".join(f"{count} × {reason}" for reason, count in reasons)
    raise ValueError(
        f"--max-bad: at most {int(limit)} of {total} records may be bad, got {len(rejected)} "
        f"({listed}); the last: {rejected[-1].error}"
    )


def _jobs(
    order: np.ndarray, checked: np.ndarray, settings: ShardOptions, folder: Path
) -> list[_Job]:
    good = checked[:, 0] != BAD
    if not good.any():
        raise ValueError(
            f"input: must hold a good record, got {len(order)} bad ones; see --max-bad"
        )
    rows, sizes = order[good], np.asarray(checked[good, 0])
    starts = cut(sizes, settings.shard_size, settings.samples_per_shard)
    return [
        _Job(folder / f"shard-{number:06d}.tar", rows[start:end], sizes[start:end], start)
        for number, (start, end) in enumerate(pairwise(starts.tolist()))
    ]


def _write(
    intake: Intake,
    jobs: list[_Job],
    num_workers: int,
    report: ShardReport,
    on_progress: Progress | None,
) -> None:
    with closing(in_order(partial(write_shard, intake), jobs, num_workers)) as results:
        for done, kept in enumerate(results, 1):
            report.kept_shards += kept
            if on_progress:
                on_progress("Writing", done, len(jobs))


def _listing(report: ShardReport) -> list[dict[str, Any]]:
    return [{**entry._asdict(), "reason": entry.reason} for entry in report.skipped]
