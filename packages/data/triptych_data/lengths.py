"""How long every sample is under a processor: measured once, kept beside the shards."""

import fcntl
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from triptych_data.processor import Processor
from triptych_data.reader import Shards
from triptych_data.workers import begin_worker, worker_context

Progress = Callable[[int, int], None]
"""Called with the number of samples measured so far and the number to measure."""

_CHUNK = 2048  # samples per task: ~1 s of one core
_INLINE_BYTES = 2_000_000  # text that one process measures before a pool would have started


class Lengths(NamedTuple):
    """Per sample, (N,) int32 each: tokens, targets among them, image patches."""

    num_tokens: np.ndarray
    num_targets: np.ndarray
    num_patches: np.ndarray


def sample_lengths(
    shards: Shards,
    processor: Processor,
    *,
    num_workers: int | None = None,
    progress: Progress | None = None,
) -> Lengths:
    """Return the lengths of all samples, measuring those of shards without a valid cache.

    The cache of a shard is `<shard>.tar.lengths-<processor>.safetensors` beside it, or in
    `$XDG_CACHE_HOME/triptych` if that place cannot be written. Processes that ask at the same time
    on one host wait for the first. `num_workers` is the number of cores by default.

    Raises ValueError, naming the sample, for one that the processor refuses.
    """
    cached = [_load(shards, shard, processor) for shard in range(len(shards.paths))]
    if None in cached:
        first = shards.paths[cached.index(None)]
        with _locked(first):
            _measure_missing(shards, processor, num_workers or _num_cores(), progress)
            cached = [_load(shards, shard, processor) for shard in range(len(shards.paths))]
    lengths = [shard for shard in cached if shard is not None]
    assert len(lengths) == len(cached), "just written"
    return Lengths(*(np.concatenate(columns) for columns in zip(*lengths, strict=True)))


def fitting_samples(
    shards: Shards, lengths: Lengths, seq_len: int, max_patches: int | None, *, skip_long: bool
) -> np.ndarray:
    """Return the ids (M,) int64 of the samples that one pack can hold.

    Raises ValueError, naming the first sample that does not fit, unless `skip_long`; and if none
    fits.
    """
    fits = lengths.num_tokens <= seq_len
    if max_patches is not None:
        fits &= lengths.num_patches <= max_patches
    if not fits.all() and not skip_long:
        sample = int(np.argmin(fits))
        raise ValueError(
            f"{shards.where(sample)}: a sample must fit data.seq_len={seq_len} tokens and "
            f"data.max_patches={max_patches}, got {lengths.num_tokens[sample]} tokens and "
            f"{lengths.num_patches[sample]} patches, and {(~fits).sum()} of {len(fits)} samples do "
            "not fit; raise the bounds, lower data.max_pixels, or set data.long_samples=skip"
        )
    if not fits.any():
        raise ValueError(
            f"data.shards: must hold samples of at most data.seq_len={seq_len} tokens, got "
            f"{len(fits)} samples and none that fits; raise data.seq_len"
        )
    return np.flatnonzero(fits)


def _measure_missing(
    shards: Shards, processor: Processor, num_workers: int, progress: Progress | None
) -> None:
    """Measure and cache every shard that has no cache yet, one shard after the other."""
    missing = [i for i in range(len(shards.paths)) if _load(shards, i, processor) is None]
    total = sum(shards.indexes[shard].num_samples for shard in missing)
    text = sum(int(shards.indexes[shard].text_bytes.sum()) for shard in missing)
    done = 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    if num_workers == 1 or text < _INLINE_BYTES:
        for shard in missing:
            first, last = (int(i) for i in shards.sample_start[shard : shard + 2])
            rows = _measure(shards, processor, range(first, last), report)
            _store(shards, shard, processor, rows)
        return
    with ProcessPoolExecutor(
        num_workers, worker_context(), initializer=_begin, initargs=(processor,)
    ) as pool:
        try:
            for shard in missing:
                _store(shards, shard, processor, _measure_in(pool, shards, shard, report))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _measure_in(
    pool: ProcessPoolExecutor, shards: Shards, shard: int, report: Callable[[int], None]
) -> np.ndarray:
    path, num_samples = str(shards.paths[shard]), shards.indexes[shard].num_samples
    chunks = [range(i, min(i + _CHUNK, num_samples)) for i in range(0, num_samples, _CHUNK)]
    futures = {pool.submit(_measure_chunk, path, chunk): chunk for chunk in chunks}
    rows = np.zeros((num_samples, 3), dtype=np.int32)
    for future in as_completed(futures):
        chunk = futures[future]
        rows[chunk.start : chunk.stop] = future.result()
        report(len(chunk))
    return rows


def _measure(
    shards: Shards,
    processor: Processor,
    samples: range,
    report: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Return (len(samples), 3) int32, the columns of `Lengths`."""
    rows = np.zeros((len(samples), 3), dtype=np.int32)
    for row, sample in enumerate(samples):
        try:
            rows[row] = processor.measure(shards.read_json(sample), shards.media_of(sample))
        except ValueError as error:
            raise ValueError(f"{shards.where(sample)}: {error}") from error
        if report is not None and ((row + 1) % _CHUNK == 0 or row + 1 == len(samples)):
            report(row % _CHUNK + 1)
    return rows


_processor: Processor | None = None  # of this worker process


def _begin(processor: Processor) -> None:
    global _processor
    begin_worker()
    _processor = processor


def _measure_chunk(path: str, samples: range) -> np.ndarray:
    assert _processor is not None, "set when the worker began"
    return _measure(_open_shard(path), _processor, samples)


@lru_cache(maxsize=4)
def _open_shard(path: str) -> Shards:
    return Shards.open([path])


def _load(shards: Shards, shard: int, processor: Processor) -> Lengths | None:
    """Return a shard's cached lengths, or None if there are none for this content and processor."""
    for path in _cache_paths(shards, shard, processor):
        with suppress(OSError, SafetensorError), safe_open(path, "numpy") as file:
            if file.metadata() == _metadata(shards, shard, processor):
                return Lengths(*(file.get_tensor(name) for name in Lengths._fields))
    return None


def _store(shards: Shards, shard: int, processor: Processor, rows: np.ndarray) -> None:
    columns = {name: np.ascontiguousarray(rows[:, i]) for i, name in enumerate(Lengths._fields)}
    data = save(columns, metadata=_metadata(shards, shard, processor))
    beside, elsewhere = _cache_paths(shards, shard, processor)
    try:
        _write_whole(beside, data)
    except OSError:  # read-only data is common
        elsewhere.parent.mkdir(parents=True, exist_ok=True)
        _write_whole(elsewhere, data)


def _metadata(shards: Shards, shard: int, processor: Processor) -> dict[str, str]:
    return {"shard": shards.indexes[shard].fingerprint, "processor": processor.fingerprint}


def _cache_paths(shards: Shards, shard: int, processor: Processor) -> tuple[Path, Path]:
    tar, content = shards.paths[shard], shards.indexes[shard].fingerprint
    suffix = f"lengths-{processor.fingerprint[:12]}.safetensors"
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (
        tar.with_name(f"{tar.name}.{suffix}"),
        home / "triptych" / f"{tar.name}.{content[:12]}.{suffix}",
    )


def _write_whole(path: Path, data: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("rb") as file:
        with suppress(OSError):  # some network file systems cannot lock: then each process measures
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _num_cores() -> int:
    return len(os.sched_getaffinity(0))
