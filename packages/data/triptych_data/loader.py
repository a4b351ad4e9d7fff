"""Endless batches for one rank, prepared by worker processes, resumable at any position."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from triptych_data.batch import Batch, collate
from triptych_data.config import DataConfig
from triptych_data.lengths import Progress, fitting_samples, sample_lengths
from triptych_data.packing import pack_lengths
from triptych_data.plan import Plan
from triptych_data.processor import Processor
from triptych_data.reader import Shards
from triptych_data.workers import begin_worker, start_server, worker_context


class PackLoader:
    """The batches of one rank out of the global stream of packs, which all ranks share.

    The stream depends on shards, processor and config only; pack number p goes to rank
    p % world_size, so the same packs are trained on, in the same order, whatever the number of
    ranks or workers. `position` counts the packs all ranks have consumed; it may be set at any
    time, also while iterating. Batches prepared ahead do not count.

    Raises ValueError for shards without index, and samples that are refused or too long.
    """

    def __init__(
        self,
        config: DataConfig,
        processor: Processor,
        *,
        rank: int,
        world_size: int,
        progress: Progress | None = None,
    ) -> None:
        assert 0 <= rank < world_size
        if config.num_workers:
            start_server()
        self.position = 0
        self.shards = Shards.open(config.shards)
        lengths = sample_lengths(self.shards, processor, progress=progress)
        samples = fitting_samples(
            self.shards,
            lengths,
            config.seq_len,
            config.max_patches,
            skip_long=config.long_samples == "skip",
        )
        self.num_skipped = self.shards.num_samples - len(samples)
        self.plan = Plan(
            samples,
            lengths,
            seed=config.seed,
            seq_len=config.seq_len,
            open_bins=config.open_bins,
            max_patches=config.max_patches,
        )
        self._num_tokens = lengths.num_tokens
        self._config = config
        self._processor = processor
        self._rank = rank
        self._world_size = world_size

    def __iter__(self) -> Iterator[Batch]:
        """Yield this rank's batches from `position` on, without end.

        Raises ValueError, naming the sample, for one that cannot be read or decoded.
        """
        while True:
            expected = self.position
            for batch in self._batches_from(expected):
                if self.position != expected:
                    break  # the position was set: start anew from there
                self.position = expected = expected + self._world_size
                yield batch

    def describe(self) -> dict[str, int]:
        """Counts for people: samples and packs of the first epoch, and samples left out."""
        self.plan.pack(0)  # plans the first epoch
        counts = {
            "samples": len(self.plan.samples),
            "packs an epoch": self.plan.epoch_starts[1],
        }
        return counts | ({"samples too long": self.num_skipped} if self.num_skipped else {})

    def state_dict(self) -> dict[str, Any]:
        """Return what a resume needs: the position, and what gives it its meaning."""
        starts = self.plan.epoch_starts
        known = [start for start in starts if start <= self.position]
        return {"position": self.position, "epoch_starts": known, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position; the number of ranks and workers may have changed since.

        Raises ValueError if shards, processor or packing are not those the state was saved with.
        """
        for name, value in self._identity().items():
            if name not in state or state[name] != value:
                raise ValueError(
                    f"checkpoint data state: {name} must be {value!r} as in this run, got "
                    f"{state.get(name)!r}; {_CAUSES[name]}, or start the data anew"
                )
        self.plan.epoch_starts = list(state["epoch_starts"])
        self.position = state["position"]

    def _identity(self) -> dict[str, Any]:
        return {
            "data": self.shards.fingerprint,
            "processor": self._processor.fingerprint,
            "seed": self._config.seed,
            "seq_len": self._config.seq_len,
            "open_bins": self._config.open_bins,
            "max_patches": self._config.max_patches,
            "long_samples": self._config.long_samples,
        }

    def _batches_from(self, position: int) -> Iterator[Batch]:
        # A resume may start between multiples of world_size; every step still takes the next ones.
        first = position + (self._rank - position) % self._world_size
        positions = itertools.count(first, self._world_size)
        jobs = (_job(self.plan.pack(p), self._num_tokens) for p in positions)
        dataset = _PackDataset(self.shards, self._processor, self._config.seq_len)
        return _prepare(dataset, jobs, self._config.num_workers, self._config.prefetch)


_CAUSES = {
    "data": "restore the shards in data.shards (their content or order has changed)",
    "processor": "restore the model folder, data.min_pixels and data.max_pixels",
    "seed": "set data.seed back",
    "seq_len": "set data.seq_len back",
    "open_bins": "set data.open_bins back",
    "max_patches": "set data.max_patches back",
    "long_samples": "set data.long_samples back",
}


def eval_batches(
    shards: Sequence[str | Path],
    processor: Processor,
    seq_len: int,
    rank: int,
    world_size: int,
    *,
    num_workers: int = 0,
) -> Iterator[Batch]:
    """Yield this rank's share of held-out shards: over all ranks each sample exactly once.

    Every rank gets the same number of batches, the last ones empty where packs run out. Raises
    ValueError as `PackLoader` does; a sample longer than `seq_len` is always refused.
    """
    opened = Shards.open(shards)
    lengths = sample_lengths(opened, processor)
    fitting_samples(opened, lengths, seq_len, None, skip_long=False)
    packs = pack_lengths(lengths.num_tokens, seq_len)
    num_rounds = -(-len(packs) // world_size)
    jobs = (
        _job(packs[p] if p < len(packs) else [], lengths.num_tokens)
        for p in range(rank, num_rounds * world_size, world_size)
    )
    return _prepare(_PackDataset(opened, processor, seq_len), jobs, num_workers, prefetch=2)


class _Job(NamedTuple):
    samples: list[int]
    num_tokens: list[int]  # of each sample, as planned


class _Failure(NamedTuple):
    message: str


class _PackDataset(Dataset):
    """Builds batches where it is; a pickled copy holds paths only and opens them again."""

    def __init__(self, shards: Shards, processor: Processor, seq_len: int) -> None:
        self._shards = shards
        self._processor = processor
        self._seq_len = seq_len

    def __reduce__(self) -> tuple[Any, ...]:
        paths = [str(path) for path in self._shards.paths]
        return _reopen, (paths, self._shards.fingerprint, self._processor, self._seq_len)

    def __getitem__(self, job: _Job) -> Batch | _Failure:
        try:
            samples = [self._encode(*item) for item in zip(*job, strict=True)]
        except ValueError as error:
            return _Failure(str(error))  # torch would bury the message in a traceback
        batch = collate(
            samples,
            self._seq_len,
            pad_token_id=self._processor.pad_token_id,
        )
        # Every tensor crosses processes as shared memory over a connection of its own (~1 ms);
        # only pixels are worth one, and the rest travels as arrays.
        small = (name for name in batch if torch.is_tensor(batch[name]) and name != "pixel_values")
        return {**batch, **{name: batch[name].numpy() for name in small}}

    def _encode(self, sample: int, num_tokens: int) -> Any:
        encoded = self._processor.encode(self._shards.read(sample))
        if len(encoded.input_ids) != num_tokens:
            raise ValueError(
                f"{self._shards.where(sample)}: must have the {num_tokens} tokens that were "
                f"planned, got {len(encoded.input_ids)}; its image sizes are not those in the "
                "index: run triptych-data index --overwrite on its shard"
            )
        return encoded


def _reopen(paths: list[str], fingerprint: str, processor: Processor, seq_len: int) -> _PackDataset:
    shards = Shards.open(paths)
    if shards.fingerprint != fingerprint:
        raise ValueError(
            "data.shards: must not change during a run, got other indexes than at its start; "
            "start the run again"
        )
    return _PackDataset(shards, processor, seq_len)


def _job(samples: list[int] | np.ndarray, num_tokens: np.ndarray) -> _Job:
    ids = np.asarray(samples, dtype=np.int64)
    return _Job(ids.tolist(), num_tokens[ids].tolist())


def _prepare(
    dataset: _PackDataset, jobs: Iterable[_Job], num_workers: int, prefetch: int
) -> Iterator[Batch]:
    """Yield the batch of each job, in the order of the jobs."""
    loader = DataLoader(
        dataset,
        batch_size=None,  # a job is a batch
        sampler=jobs,
        collate_fn=_as_is,
        num_workers=num_workers,
        prefetch_factor=prefetch if num_workers else None,
        multiprocessing_context=worker_context() if num_workers else None,
        worker_init_fn=begin_worker,
        generator=torch.Generator(),  # else it would draw from the global stream: no exact resume
    )
    for result in loader:
        if isinstance(result, _Failure):
            raise ValueError(result.message)
        yield {
            name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
            for name, value in result.items()
        }


def _as_is(batch: Any) -> Any:
    return batch
