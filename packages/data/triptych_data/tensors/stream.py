"""Batches of latents, noise and times: what runs in data workers, or inline without any."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from torch import Tensor

from triptych_data.batch import Batch
from triptych_data.faults import BadSample, Hole, reason_of
from triptych_data.plan.permutation import permute, stream_key
from triptych_data.prepare import Place
from triptych_data.shards.reader import Shards
from triptych_data.tensors.record import TensorSample, decode
from triptych_data.workers.server import Note

HELDOUT = -1
"""The epoch of held-out samples: their noise and times are the same in every evaluation."""


@dataclass(frozen=True)
class TensorBatches:
    """Reads samples and draws what is random of them, from (seed, sample, epoch) alone.

    So a sample's noise and time are the same on any number of ranks and workers, and after a
    resume.
    """

    shards: Shards
    batch_size: int
    shape: tuple[int, ...]
    """of a sample's latents"""
    mean: Tensor
    std: Tensor
    """(C or 1, 1, ...): latents become (x - mean) / std"""
    seed: int
    num_classes: int | None
    """None: without labels"""

    def build(self, ids: Sequence[int], epochs: Sequence[int], note: Note) -> Batch:
        """The batch of the samples `ids`, at most N, each in its epoch; those left out are in
        `holes`.

        - `latents`, `noise` (N, C, ...) fp32, zeros where there is no sample
        - `times`, `drops` (N,) fp32 in [0, 1); `weights` (N,) fp32, 1, or 0 without a sample
        - `labels` (N,) int64, of samples with labels
        - `num_targets`: elements of the latents that are there; `num_tokens`: samples
        - `sample_keys`, `sample_ids` of those that are in it
        """
        n = self.batch_size
        latents, noise = (torch.zeros(n, *self.shape) for _ in range(2))
        times, drops, weights = (torch.zeros(n) for _ in range(3))
        labels = torch.zeros(n, dtype=torch.int64)
        holes: list[Hole] = []
        kept: list[int] = []
        for row, (sample, epoch) in enumerate(zip(ids, epochs, strict=True)):
            note(sample)
            found = self._read(sample)
            if isinstance(found, Hole):
                holes.append(found)
                continue
            kept.append(sample)
            draws = _generator(self.seed, sample, epoch)
            times[row], drops[row] = torch.from_numpy(draws.random(2, dtype=np.float32))
            noise[row] = _normal(draws, self.shape)
            latents[row] = found.latents
            if found.std is not None:
                latents[row] += found.std * _normal(draws, self.shape)
            latents[row] = (latents[row] - self.mean) / self.std
            weights[row], labels[row] = 1.0, found.label
        batch: Batch = {
            "latents": latents,
            "noise": noise,
            "times": times,
            "drops": drops,
            "weights": weights,
            "num_targets": len(kept) * latents[0].numel(),
            "num_tokens": len(kept),
            "sample_keys": [self.shards.keys(sample) for sample in kept],
            "sample_ids": kept,
            "holes": holes,
        }
        return batch if self.num_classes is None else batch | {"labels": labels}

    def _read(self, sample: int) -> TensorSample | Hole:
        where = self.shards.where(sample)
        try:
            members = self.shards.read_members(sample)
            return decode(members, where, shape=self.shape, num_classes=self.num_classes)
        except BadSample as error:
            return self._hole(sample, error)
        except ValueError as error:
            return self._hole(sample, BadSample(str(error), "damaged"))

    def _hole(self, sample: int, error: BadSample) -> Hole:
        return Hole(self.shards.keys(sample), "shards", reason_of(error), str(error), sample)


@dataclass(frozen=True)
class TensorStream:
    """The batches of one rank, without end; callable as the work of `workers.pool`.

    Of each next world_size * N samples of the order rank r takes the r-th N. Every epoch is an
    order of its own of all samples; a batch may hold the end of one and the begin of the next.
    """

    batches: TensorBatches
    rank: int
    world_size: int

    def __call__(
        self, note: Note, worker: int, num_workers: int, position: int
    ) -> Generator[Batch]:
        """Yield the worker's batches from `position` on, samples consumed by all ranks."""
        n = self.batches.batch_size
        stride = n * self.world_size
        for turn in count():
            if turn % num_workers == worker:
                begin = position + turn * stride
                mine = begin + self.rank * n
                yield self._build(mine, note) | {
                    "place": Place(mine, mine + n, begin + stride, self._epoch(mine))
                }

    def _build(self, position: int, note: Note) -> Batch:
        batches, size = self.batches, self.batches.shards.num_samples
        key = stream_key(batches.seed, "order")
        places = np.arange(position, position + batches.batch_size)
        epochs = places // size
        ids = permute(places % size, size, key, epochs)
        return batches.build(ids.tolist(), epochs.tolist(), note)

    def _epoch(self, position: int) -> int:
        return position // self.batches.shards.num_samples


def _generator(seed: int, sample: int, epoch: int) -> np.random.Generator:
    key = np.array([stream_key(seed, "noise", epoch), sample], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def _normal(draws: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(draws.standard_normal(shape, dtype=np.float32))
