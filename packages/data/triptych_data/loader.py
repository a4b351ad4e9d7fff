"""Endless batches for one rank, prepared by worker processes, resumable at any position."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from triptych_data.batch import Batch, Finish
from triptych_data.config import DataConfig
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
from triptych_data.rank_loader import RankLoader
from triptych_data.resume import differences
from triptych_data.shards.reader import Shards
from triptych_data.workers.pool import start_server


class PackLoader(RankLoader):
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
        shards, sources = open_sources(config)
        lengths = sample_lengths(shards, processor, progress=progress)
        self._counts = _check(shards, lengths, processor, config)
        self.plan = Plan(config, sources, lengths, processor.fingerprint)
        self.builder = PackBuilder(
            shards,
            processor,
            lengths.num_tokens,
            self.plan.pieces,
            config.seq_len,
            sources,
            finish,
        )
        self._parts: dict[str, Any] = processor.parts
        super().__init__(config, shards, RankStream(self.plan, self.builder, rank, world_size))

    def describe(self) -> dict[str, int]:
        """Counts for people: samples of an epoch, and those left out."""
        return {name: count for name, count in self._counts.items() if count or name == "samples"}

    def identity(self) -> dict[str, Any]:
        """Shards, processor and packing."""
        return {"plan": self.plan.fingerprint(), "processor": self._parts}

    def changes(self, state: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Of a processor that is another, the parts that are."""
        changed = super().changes(state)
        if "processor" in changed:
            parts = differences(state.get("processor", self._parts), self._parts)
            named = {f"processor.{name}": values for name, values in parts.items()}
            changed = {k: v for k, v in changed.items() if k != "processor" or not named} | named
        return changed

    def next_begin(self, position: int) -> int:
        """Where a pack of this plan begins."""
        return self.plan.next_begin(position)


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
