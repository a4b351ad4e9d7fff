"""Planned samples to batches: what runs in data workers, or inline without any."""

from bisect import bisect_right
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count, islice
from typing import NamedTuple

import numpy as np

from triptych_data.batch import Batch, Finish, collate
from triptych_data.encoded import EncodedSample, cut_piece
from triptych_data.faults import BadSample, Hole, reason_of
from triptych_data.plan.pieces import Pieces
from triptych_data.plan.plan import Plan, PlanSource
from triptych_data.processor import Processor
from triptych_data.shards.reader import Shards
from triptych_data.workers.server import Note


class Place(NamedTuple):
    """Where a batch stands in the stream of packs, counted in samples."""

    position: int
    """samples before its pack"""
    end: int
    """samples before the pack after it"""
    next_position: int
    """samples before the first pack of the next micro-step, over all ranks"""
    epoch: int


@dataclass(frozen=True)
class RankStream:
    """The batches of one rank, without end; callable as the work of `workers.pool`.

    Every worker plans for itself, and builds every `num_workers`-th batch. Rank r takes pack r of
    each next `world_size` packs. A batch tells its `place`.
    """

    plan: Plan
    builder: "PackBuilder"
    rank: int
    world_size: int

    def __call__(
        self, note: Note, worker: int, num_workers: int, position: int
    ) -> Generator[Batch]:
        """Yield the worker's batches from `position` on."""
        packs = self.plan.packs(position)
        for turn in count():
            group = list(islice(packs, self.world_size))
            if turn % num_workers == worker:
                pack = group[self.rank]
                place = Place(
                    pack.position,
                    pack.next_position,
                    group[-1].next_position,
                    self.plan.epoch(pack.position),
                )
                batch = self.builder.build(pack.samples.tolist(), note, place.epoch)
                yield batch | {"place": place}


@dataclass(frozen=True)
class PackBuilder:
    """Reads, encodes and packs samples; one that fails leaves a hole."""

    shards: Shards
    processor: Processor
    num_tokens: np.ndarray
    """(N,) int32, of each sample, as planned"""
    pieces: Pieces
    """of the samples, by which the plan counts"""
    seq_len: int
    sources: Sequence[PlanSource] = ()
    """whose samples are those of `shards`, one source after the other"""
    finish: Finish | None = None
    """the last thing done to a batch"""

    def build(self, ids: Sequence[int], note: Note, epoch: int | None = None) -> Batch:
        """Return the batch of the pieces `ids`, in this order, those left out listed in `holes`.

        `sample_ids` are the numbers of those that are in it. Images are varied by `epoch`, and
        without it as they are stored. Raises ValueError, naming the shard, if a whole shard cannot
        be read any more.
        """
        encoded: list[EncodedSample] = []
        holes: list[Hole] = []
        places = [self.pieces.locate(piece) for piece in ids]
        self._warm([sample for sample, _ in places])
        for piece, (sample, number) in zip(ids, places, strict=True):
            note(sample)
            found = self._encode(sample, epoch)
            if isinstance(found, Hole):
                holes.append(found._replace(sample=piece))
            else:
                encoded.append(cut_piece(found, number, self.seq_len))
        batch = collate(
            encoded,
            self.seq_len,
            pad_token_id=self.processor.pad_token_id,
            position_axes=self.processor.position_axes,
        )
        lost = {hole.sample for hole in holes}
        kept = [piece for piece in ids if piece not in lost]
        batch |= {"sample_ids": kept, "holes": holes}
        return batch if self.finish is None else self.finish(batch, epoch)

    def _warm(self, samples: Sequence[int]) -> None:
        """Fetch what lies on servers, many samples at once; what fails will fail again alone."""
        with suppress(OSError, ValueError):
            self.shards.warm(samples)

    def _encode(self, sample: int, epoch: int | None) -> EncodedSample | Hole:
        try:
            raw = self.shards.read(sample)
        except OSError as error:
            raise self._lost(sample, error) from error
        except ValueError as error:
            self._check_shard(sample)
            return self._hole(sample, BadSample(str(error), "damaged"))
        try:
            encoded = self.processor.encode(raw, epoch)
            self._check_length(sample, len(encoded.input_ids))
        except ImportError:  # a decoder is missing, not a sample bad
            raise
        except Exception as error:  # one odd file must not end a run of weeks; holes have a limit
            return self._hole(sample, error)
        return encoded

    def _check_length(self, sample: int, length: int) -> None:
        planned = int(self.num_tokens[sample])
        if length != planned:
            raise BadSample(
                f"{self.shards.where(sample)}: must have the {planned} tokens that were planned, "
                f"got {length}; its media are not those in the index: run triptych-data index "
                "--overwrite on its shard",
                "too long" if length > planned else "too short",
            )

    def _check_shard(self, sample: int) -> None:
        """Raise ValueError if it is not only this sample that is damaged."""
        shard = bisect_right(self.shards.sample_start, sample) - 1
        path, expected = self.shards.paths[shard], self.shards.indexes[shard].tar_bytes
        if isinstance(path, str):
            return  # what a server serves was checked when the file was opened
        try:
            size = path.stat().st_size
        except OSError as error:
            raise self._lost(sample, error) from error
        if size != expected:
            raise self._lost(sample, f"{size} bytes instead of {expected}")

    def _lost(self, sample: int, what: object) -> ValueError:
        return ValueError(
            f"{self.shards.where(sample)}: its shard must stay as it is during a run, got {what}; "
            "restore the shard and resume, or take it out of data.shards and start anew"
        )

    def _hole(self, sample: int, error: Exception) -> Hole:
        where = self.shards.where(sample)
        message = str(error)
        if not message.startswith(where):
            message = f"{where}: {type(error).__name__}: {message}"
        key, source = self.shards.keys(sample), self._source(sample)
        return Hole(key, source, reason_of(error), message, sample)

    def _source(self, sample: int) -> str:
        for source in self.sources:
            if sample < source.num_samples:
                return source.name
            sample -= source.num_samples
        return "shards"
