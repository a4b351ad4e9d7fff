"""Batches of latents, noise and times: what runs in data workers, or inline without any."""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from triptych_data.batch import Batch
from triptych_data.faults import BadSample, Hole, reason_of
from triptych_data.plan.permutation import permute, stream_key
from triptych_data.prepare import Place
from triptych_data.shards.reader import Shards
from triptych_data.tensors.record import LATENTS, SCALED, STD, TEXT, TensorSample, Wanted, decode
from triptych_data.workers.server import Note

HELDOUT = -1
"""The epoch of held-out samples: their noise and times are the same in every evaluation."""


class Batches(Protocol):
    """Samples by number, and what is random of them, by seed, sample and epoch."""

    @property
    def seed(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def num_samples(self) -> int: ...
    def build(self, ids: Sequence[int], epochs: Sequence[int], note: Note) -> Batch: ...


@dataclass(frozen=True)
class TensorBatches:
    """Reads samples and draws what is random of them, from (seed, sample, epoch) alone.

    So a sample's noise and time are the same on any number of ranks and workers, and after a
    resume.
    """

    shards: Shards
    batch_size: int
    wanted: Wanted
    mean: Tensor
    std: Tensor
    """(C or 1, 1, ...): latents become (x - mean) / std, those of a condition, too"""
    seed: int
    given_frames: int = 0
    empty_text: Tensor | None = None
    """(rows, width)"""

    @property
    def num_samples(self) -> int:
        """Of an epoch."""
        return self.shards.num_samples

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of a sample's tensors in a batch, by name."""
        return {name: shape for name, shape in self.wanted.shapes.items() if name != STD}

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a sample's latents."""
        return self.wanted.shapes[LATENTS]

    def build(self, ids: Sequence[int], epochs: Sequence[int], note: Note) -> Batch:
        """The batch of the samples `ids`, at most N, each in its epoch; those left out are in
        `holes`.

        - `latents`, `noise` (N, C, ...) fp32, zeros where there is no sample
        - `times`, `drops` (N,) fp32 in [0, 1); `weights` (N,) fp32, 1, or 0 without a sample
        - with labels `labels` (N,) int64; with texts `text_features` (N, L, D) fp32, and
          `empty_text` (1, L, D); further features by their names; `texts`, words of those samples
          that are there, if they are wanted
        - `num_targets`: elements of the latents that are there and not given; `num_tokens`:
          samples; `given_frames`, if there are any
        - `sample_keys`, `sample_ids` of those that are in it; `sample_epochs` of these, and then of
          those left out
        """
        rows = {n: torch.zeros(self.batch_size, *shape) for n, shape in self.shapes.items()}
        rows |= {"noise": torch.zeros_like(rows[LATENTS])}
        rows |= {name: torch.zeros(self.batch_size) for name in ("times", "drops", "weights")}
        labels = torch.zeros(self.batch_size, dtype=torch.int64)
        holes: list[Hole] = []
        kept: list[int] = []
        kept_epochs: list[int] = []
        lost_epochs: list[int] = []
        texts: list[str] = []
        for row, (sample, epoch) in enumerate(zip(ids, epochs, strict=True)):
            note(sample)
            found = self._read(sample)
            if isinstance(found, Hole):
                holes.append(found)
                lost_epochs.append(epoch)
                continue
            kept.append(sample)
            kept_epochs.append(epoch)
            texts.append(found.text)
            labels[row] = found.label
            for name, value in self._drawn(found.tensors, sample, epoch).items():
                # Texts are shorter than their row.
                (rows[name][row, : len(value)] if name == TEXT else rows[name][row]).copy_(value)
        latents = rows[LATENTS]
        targets = latents[0, :, self.given_frames :] if self.given_frames else latents[0]
        batch: Batch = {
            **rows,
            "num_targets": len(kept) * targets.numel(),
            "num_tokens": len(kept),
            "sample_keys": [self.shards.keys(sample) for sample in kept],
            "sample_ids": kept,
            "sample_epochs": [*kept_epochs, *lost_epochs],
            "holes": holes,
        }
        if self.wanted.text_field is not None:
            batch["texts"] = texts
        return batch | self._conditions(labels)

    def _drawn(self, tensors: dict[str, Tensor], sample: int, epoch: int) -> dict[str, Tensor]:
        """A sample's tensors with what is random of it, in the order in which it is drawn."""
        draws = _generator(self.seed, sample, epoch)
        time, drop = torch.from_numpy(draws.random(2, dtype=np.float32))
        noise, latents = _normal(draws, self.shape), tensors[LATENTS]
        if STD in tensors:
            latents = latents + tensors[STD] * _normal(draws, self.shape)
        kept = {name: value for name, value in tensors.items() if name != STD}
        scaled = {LATENTS: latents} | {n: kept[n] for n in SCALED[1:] if n in kept}
        scaled = {name: (value - self.mean) / self.std for name, value in scaled.items()}
        one = torch.ones(())
        drawn = {"noise": noise, "times": time, "drops": drop, "weights": one}
        return kept | drawn | scaled

    def _conditions(self, labels: Tensor) -> Batch:
        found: Batch = {} if self.wanted.num_classes is None else {"labels": labels}
        if TEXT in self.wanted.shapes:
            empty = torch.zeros(1, *self.wanted.shapes[TEXT])
            if self.empty_text is not None:
                empty[0, : len(self.empty_text)] = self.empty_text
            found["empty_text"] = empty
        return found | ({"given_frames": self.given_frames} if self.given_frames else {})

    def _read(self, sample: int) -> TensorSample | Hole:
        where = self.shards.where(sample)
        try:
            members = self.shards.read_members(sample)
            return decode(members, where, self.wanted)
        except BadSample as error:
            return self._hole(sample, error)
        except ValueError as error:
            return self._hole(sample, BadSample(str(error), "damaged"))

    def _hole(self, sample: int, error: BadSample) -> Hole:
        return Hole(self.shards.keys(sample), "shards", reason_of(error), str(error), sample)


@dataclass(frozen=True)
class SampleStream:
    """The batches of one rank, without end; callable as the work of `workers.pool`.

    Of each next world_size * N samples of the order rank r takes the r-th N. Every epoch is an
    order of its own of all samples; a batch may hold the end of one and the begin of the next.
    """

    batches: Batches
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
        batches, size = self.batches, self.batches.num_samples
        key = stream_key(batches.seed, "order")
        places = np.arange(position, position + batches.batch_size)
        epochs = places // size
        ids = permute(places % size, size, key, epochs)
        return batches.build(ids.tolist(), epochs.tolist(), note)

    def _epoch(self, position: int) -> int:
        return position // self.batches.num_samples


def heldout(batches: Batches, rank: int, world_size: int) -> Iterator[Batch]:
    """This rank's share of all samples, each once; equally many batches on every rank.

    Raises ValueError for a bad sample.
    """
    total, n = batches.num_samples, batches.batch_size
    for begin in range(0, total, n * world_size):
        first = begin + rank * n
        ids = range(min(first, total), min(first + n, total))
        batch = batches.build(ids, [HELDOUT] * len(ids), _nobody)
        for hole in batch["holes"]:
            raise ValueError(hole.message)
        yield batch


def _nobody(sample: int) -> None:
    """Nobody watches an evaluation's reading."""


def _generator(seed: int, sample: int, epoch: int) -> np.random.Generator:
    key = np.array([stream_key(seed, "noise", epoch), sample], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def _normal(draws: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(draws.standard_normal(shape, dtype=np.float32))
