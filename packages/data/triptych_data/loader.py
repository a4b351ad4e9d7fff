"""Endless batches for one rank, prepared by worker processes, resumable at any position."""

import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from triptych_data.batch import Batch, Finish
from triptych_data.config import DataConfig
from triptych_data.faults import Faults
from triptych_data.plan.lengths import (
    Lengths,
    Progress,
    check_refused,
    fitting_samples,
    sample_lengths,
)
from triptych_data.plan.packing import pack_lengths
from triptych_data.plan.pieces import cut_documents, is_document
from triptych_data.plan.plan import Plan, PlanSource
from triptych_data.prepare import PackBuilder, RankStream
from triptych_data.processor import Processor
from triptych_data.resume import differences, in_words
from triptych_data.shards.reader import Shards
from triptych_data.workers.pool import Job, run_workers, start_server

_log = logging.getLogger(__name__)


class PackLoader:
    """The batches of one rank out of the global stream of packs, which all ranks share.

    The stream depends on shards, processor and config only; of each next `world_size` packs rank r
    takes pack r, so the same packs are trained on, in the same order, whatever the number of ranks
    or workers. `position` counts the samples that all ranks have consumed; it may be set to the
    begin of any pack, also while iterating. Batches prepared ahead do not count. `finish` is done
    to every batch by the worker that made it, and must be picklable.

    Raises ValueError for shards without index, and samples that are too long or, beyond
    `data.max_bad_rate`, refused.
    """

    def __init__(
        self,
        config: DataConfig,
        processor: Processor,
        *,
        rank: int,
        world_size: int,
        progress: Progress | None = None,
        finish: Finish | None = None,
    ) -> None:
        assert 0 <= rank < world_size
        if config.num_workers:
            start_server()
        self.position = 0
        self.shards, sources = open_sources(config)
        lengths = sample_lengths(self.shards, processor, progress=progress)
        self._counts = _check(self.shards, lengths, processor, config)
        self.plan = Plan(config, sources, lengths, processor.fingerprint)
        self.faults = Faults(config.max_bad_rate)
        self.builder = PackBuilder(
            self.shards,
            processor,
            lengths.num_tokens,
            self.plan.pieces,
            config.seq_len,
            sources,
            finish,
        )
        self._parts: dict[str, Any] = processor.parts
        self._overridden: list[dict[str, Any]] = []
        self._config = config
        self._stream = RankStream(self.plan, self.builder, rank, world_size)
        self._job = Job(self._stream) if config.num_workers else None
        self._says: Callable[[], str] | None = None  # what the worker waited for is on
        self._sample = -1  # that this process itself is on

    @property
    def has_workers(self) -> bool:
        """Whether other processes prepare the batches."""
        return self._job is not None

    def __iter__(self) -> Iterator[Batch]:
        """Yield this rank's batches from `position` on, without end.

        Raises ValueError when too many samples fail, a shard is lost, or a worker hangs;
        RuntimeError when a worker dies.
        """
        while True:
            expected = self.position
            with closing(self._batches_from(expected)) as batches:
                for batch in batches:
                    if self.position != expected:
                        break  # the position was set: start anew from there
                    holes = batch["holes"]
                    self.faults.add(len(batch["sample_keys"]) + len(holes), holes)
                    self.position = expected = batch["place"].next_position
                    yield batch

    def doing(self) -> str:
        """What is being read now, for people; may be asked from another thread."""
        if self._says is not None:
            return self._says()
        return f"reading {self.shards.where(self._sample)}" if self._sample >= 0 else ""

    def describe(self) -> dict[str, int]:
        """Counts for people: samples of an epoch, and those left out."""
        return {name: count for name, count in self._counts.items() if count or name == "samples"}

    def state_dict(self) -> dict[str, Any]:
        """Return what a resume needs: the position, and what gives it its meaning."""
        plan = self.plan.fingerprint()
        state = {"position": self.position, "plan": plan, "processor": self._parts}
        return state | ({"resumed_anyway": self._overridden} if self._overridden else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position; the number of ranks and workers may have changed since.

        With `data.resume_anyway` what differs is logged, and kept in the state from then on.

        Raises ValueError otherwise, if shards, processor or packing are not those the state was
        saved with.
        """
        changed = differences(state.get("plan", {}), self.plan.fingerprint())
        if "processor" in changed:
            parts = differences(state.get("processor", self._parts), self._parts)
            named = {f"processor.{name}": values for name, values in parts.items()}
            changed = {k: v for k, v in changed.items() if k != "processor" or not named} | named
        if changed and not self._config.resume_anyway:
            raise ValueError(
                f"checkpoint data state: {in_words(changed)}; restore what has changed, start the "
                "data anew in another run.dir, or go on with data.resume_anyway=true"
            )
        self._overridden = list(state.get("resumed_anyway", []))
        if changed:
            _log.warning("data.resume_anyway: goes on although %s", in_words(changed))
            self._overridden.append({"position": state["position"], "changed": changed})
        self.position = state["position"]
        if changed:  # no pack of the new plan may begin there
            self.position = self.plan.next_begin(self.position)

    def _batches_from(self, position: int) -> Generator[Batch]:
        config = self._config
        inline = self._stream(self._take_note, 0, 1, position)
        if self._job is None:
            yield from inline
        else:
            # The first one is made here, or it would wait 3 s for a server that still imports.
            first = next(inline)
            yield first
            yield from run_workers(
                self._job,
                config.num_workers,
                (first["place"].next_position,),
                prefetch=config.prefetch,
                timeout=config.timeout_s,
                where=self.shards.where,
                waits=self._wait_for,
            )

    def _take_note(self, sample: int) -> None:
        self._sample = sample

    def _wait_for(self, says: Callable[[], str]) -> None:
        self._says = says


def open_sources(config: DataConfig) -> tuple[Shards, list[PlanSource]]:
    """Return the shards of all sources, one source after the other, and what each of them is."""
    storage = config.remote.storage
    opened = {name: Shards.open(s.shards, storage) for name, s in config.named_sources.items()}
    sources = [PlanSource(n, part.num_samples, part.fingerprint) for n, part in opened.items()]
    return Shards.joined(list(opened.values())), sources


def _check(
    shards: Shards, lengths: Lengths, processor: Processor, config: DataConfig
) -> dict[str, int]:
    """Return how many samples there are to train on and how many are left out, and why."""
    refused = check_refused(shards, lengths, processor, config.max_bad_rate)
    skips = config.long_samples == "skip"
    bounds = config.seq_len, config.max_patches, config.max_images
    fitting = fitting_samples(shards, lengths, *bounds, skip_long=skips)
    long = shards.num_samples - len(fitting) - refused
    cut = int((is_document(lengths) & (lengths.num_tokens > config.seq_len + 1)).sum())
    return {
        "samples": len(fitting),
        "documents cut": cut,
        "samples too long": long,
        "samples refused": refused,
    }


def eval_batches(
    shards: Sequence[str | Path],
    processor: Processor,
    seq_len: int,
    rank: int,
    world_size: int,
    finish: Finish | None = None,
) -> Iterator[Batch]:
    """Yield this rank's share of held-out shards: over all ranks each sample exactly once.

    Every rank gets the same number of batches, the last ones empty where packs run out. Raises
    ValueError for any sample that is too long, refused or damaged.
    """
    opened = Shards.open(shards)
    lengths = sample_lengths(opened, processor)
    check_refused(opened, lengths, processor, max_bad_rate=0.0)
    fitting_samples(opened, lengths, seq_len, None, skip_long=False)
    pieces, cut = cut_documents(lengths, seq_len)
    builder = PackBuilder(opened, processor, lengths.num_tokens, pieces, seq_len, finish=finish)
    packs = pack_lengths(cut.num_tokens, seq_len)
    for first in range(0, len(packs), world_size):
        mine = packs[first + rank].tolist() if first + rank < len(packs) else []
        batch = builder.build(mine, lambda sample: None)
        for hole in batch["holes"]:
            raise ValueError(hole.message)
        yield batch
