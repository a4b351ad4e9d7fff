"""How long every sample is under a processor: measured once, kept beside the shards."""

import fcntl
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from triptych_data.encoded import Measures
from triptych_data.plan.pieces import is_document
from triptych_data.processor import Processor
from triptych_data.shards.reader import Shards
from triptych_data.workers.pool import Job, run_workers
from triptych_data.workers.server import Note

Progress = Callable[[int, int], None]
"""Called with the number of samples measured so far and the number to measure."""

_CHUNK = 2048  # samples per task: ~1 s of one core
_INLINE_BYTES = 2_000_000  # text that one process measures before workers would have started
_TIMEOUT = 600.0  # seconds for a chunk


class Lengths(NamedTuple):
    """Per sample, (N,) each, int32 but for pairs, int64; as `Measures` of a processor.

    A sample that the processor refuses has no tokens.
    """

    num_tokens: np.ndarray
    num_targets: np.ndarray
    num_patches: np.ndarray
    num_images: np.ndarray
    patch_pairs: np.ndarray
    audio_frames: np.ndarray


def sample_lengths(
    shards: Shards,
    processor: Processor,
    *,
    num_workers: int | None = None,
    progress: Progress | None = None,
) -> Lengths:
    """Return the lengths of all samples, measuring those of shards without a valid cache.

    The cache of a shard is `<shard>.tar.lengths-<processor>.safetensors` beside it, or in
    `$XDG_CACHE_HOME/triptych` if that is a server or cannot be written. Processes that ask at the
    same time on one host wait for the first. `num_workers` is the number of cores by default.

    Raises ValueError, naming the sample, for one whose bytes are not those that were indexed.
    """
    cached = [_load(shards, shard, processor) for shard in range(len(shards.paths))]
    if None in cached:
        with _locked(shards.paths[cached.index(None)]):
            _measure_missing(shards, processor, num_workers or _num_cores(), progress)
            cached = [_load(shards, shard, processor) for shard in range(len(shards.paths))]
    lengths = [shard for shard in cached if shard is not None]
    assert len(lengths) == len(cached), "just written"
    return Lengths(*(np.concatenate(columns) for columns in zip(*lengths, strict=True)))


def fitting_samples(
    shards: Shards,
    lengths: Lengths,
    seq_len: int,
    max_patches: int | None,
    max_images: int | None = None,
    *,
    skip_long: bool,
) -> np.ndarray:
    """Return the ids (M,) int64 of the samples that one pack can hold, without refused ones.

    Documents always fit, since they are cut. Raises ValueError, naming the first sample that does
    not fit, unless `skip_long`; and if none fits.
    """
    fits = (lengths.num_tokens <= seq_len) | is_document(lengths)
    if max_patches is not None:
        fits &= lengths.num_patches <= max_patches
    if max_images is not None:
        fits &= lengths.num_images <= max_images
    if not fits.all() and not skip_long:
        sample = int(np.argmin(fits))
        raise ValueError(
            f"{shards.where(sample)}: a sample must fit data.seq_len={seq_len}, data.max_patches="
            f"{max_patches} and data.max_images={max_images}, got {lengths.num_tokens[sample]} "
            f"tokens, {lengths.num_patches[sample]} patches, {lengths.num_images[sample]} images, "
            f"and {(~fits).sum()} of {len(fits)} samples do not fit; raise the bounds, lower "
            "data.max_pixels, or set data.long_samples=skip"
        )
    fits &= lengths.num_tokens > 0
    if not fits.any():
        raise ValueError(
            f"data.shards: must hold samples of at most data.seq_len={seq_len} tokens, got "
            f"{len(fits)} samples and none that fits; raise data.seq_len"
        )
    return np.flatnonzero(fits)


def check_refused(
    shards: Shards, lengths: Lengths, processor: Processor, max_bad_rate: float
) -> int:
    """Return how many samples the processor refuses.

    Raises ValueError, with what it says of the first, if their share exceeds `max_bad_rate`.
    """
    refused = lengths.num_tokens == 0
    count = int(refused.sum())
    if count > max_bad_rate * len(refused):
        first = int(np.argmax(refused))
        try:
            _measure_one(shards, processor, first)
        except ValueError as error:
            raise ValueError(
                f"{error} ({count} of {len(refused)} samples are refused, and data.max_bad_rate="
                f"{max_bad_rate:g} allows {int(max_bad_rate * len(refused))})"
            ) from error
    return count


def _measure_missing(
    shards: Shards, processor: Processor, num_workers: int, progress: Progress | None
) -> None:
    """Measure and cache every shard that has no cache yet."""
    missing = [i for i in range(len(shards.paths)) if _load(shards, i, processor) is None]
    spans = [range(*(int(i) for i in shards.sample_start[shard : shard + 2])) for shard in missing]
    chunks = [span[i : i + _CHUNK] for span in spans for i in range(0, len(span), _CHUNK)]
    text = sum(int(shards.indexes[shard].text_bytes.sum()) for shard in missing)
    work = _Measuring(shards, processor, chunks)
    if num_workers == 1 or text < _INLINE_BYTES:
        results = work(lambda sample: None, 0, 1)
    else:
        num_workers = min(num_workers, len(chunks))
        results = run_workers(
            Job(work), num_workers, prefetch=2, timeout=_TIMEOUT, where=shards.where
        )
    done, total = 0, sum(map(len, spans))
    with closing(results):
        for shard, span in zip(missing, spans, strict=True):
            rows: list[np.ndarray] = []
            while sum(map(len, rows)) < len(span):
                rows.append(next(results))
                done += len(rows[-1])
                if progress is not None:
                    progress(done, total)
            _store(shards, shard, processor, np.concatenate(rows))


@dataclass(frozen=True)
class _Measuring:
    """The work of processes that measure: the rows of `chunks`, shared out in turn."""

    shards: Shards
    processor: Processor
    chunks: list[range]

    def __call__(self, note: Note, worker: int, num_workers: int) -> Generator[np.ndarray]:
        """Yield (len(chunk), 6) int64, the columns of `Lengths`, for each chunk."""
        for chunk in self.chunks[worker::num_workers]:
            rows = np.zeros((len(chunk), len(Lengths._fields)), dtype=np.int64)
            for row, sample in enumerate(chunk):
                note(sample)
                with suppress(_Refused):
                    rows[row] = _measure_one(self.shards, self.processor, sample)
            yield rows


class _Refused(ValueError):
    pass


def _measure_one(shards: Shards, processor: Processor, sample: int) -> Measures:
    record = shards.read_json(sample)
    try:
        return processor.measure(record, shards.media_of(sample))
    except ValueError as error:
        raise _Refused(f"{shards.where(sample)}: {error}") from error


def _load(shards: Shards, shard: int, processor: Processor) -> Lengths | None:
    """Return a shard's cached lengths, or None if there are none for this content and processor."""
    for path in _cache_paths(shards, shard, processor):
        with suppress(OSError, SafetensorError), safe_open(path, "numpy") as file:
            if file.metadata() == _metadata(shards, shard, processor):
                return Lengths(*(file.get_tensor(name) for name in Lengths._fields))
    return None


def _store(shards: Shards, shard: int, processor: Processor, rows: np.ndarray) -> None:
    columns = {
        name: np.ascontiguousarray(rows[:, i], np.int64 if name == "patch_pairs" else np.int32)
        for i, name in enumerate(Lengths._fields)
    }
    data = save(columns, metadata=_metadata(shards, shard, processor))
    *beside, elsewhere = _cache_paths(shards, shard, processor)
    try:
        _write_whole(beside[0], data)
    except (OSError, IndexError):  # read-only data is common
        elsewhere.parent.mkdir(parents=True, exist_ok=True)
        _write_whole(elsewhere, data)


def _metadata(shards: Shards, shard: int, processor: Processor) -> dict[str, str]:
    return {"shard": shards.indexes[shard].fingerprint, "processor": processor.fingerprint}


def _cache_paths(shards: Shards, shard: int, processor: Processor) -> list[Path]:
    """Return where a shard's lengths may be: beside it if it is local, and in the user's cache."""
    tar, content = shards.paths[shard], shards.indexes[shard].fingerprint
    suffix = f"lengths-{processor.fingerprint[:12]}.safetensors"
    beside = [tar.with_name(f"{tar.name}.{suffix}")] if isinstance(tar, Path) else []
    name = tar.name if isinstance(tar, Path) else "remote"
    return [*beside, _user_cache() / f"{name}.{content[:12]}.{suffix}"]


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "triptych"


def _write_whole(path: Path, data: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _locked(location: Path | str) -> Iterator[None]:
    """Hold a lock on a local shard, or on the user's cache for one on a server."""
    if isinstance(location, str):
        location = _user_cache()
        location.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(location, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems cannot lock: then each process measures
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0))
