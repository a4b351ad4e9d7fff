"""Endless batches of latents for one rank, prepared by workers, resumable at any position."""

import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from triptych_data.batch import Batch
from triptych_data.faults import Faults
from triptych_data.resume import differences, in_words
from triptych_data.shards.reader import Shards
from triptych_data.tensors.config import TensorDataConfig
from triptych_data.tensors.record import (
    LATENTS,
    NAMES,
    STD,
    TEXT,
    Shape,
    Wanted,
    decode,
    load_tensors,
)
from triptych_data.tensors.stream import HELDOUT, TensorBatches, TensorStream
from triptych_data.workers.pool import Job, run_workers, start_server

_log = logging.getLogger(__name__)


class TensorLoader:
    """The batches of one rank out of the order of samples that all ranks share.

    `position` counts the samples that all ranks have consumed; it may be set, also while
    iterating. Batches prepared ahead do not count. num_classes: labels are below; None for samples
    without.

    Raises ValueError for shards without index, and those that hold no tensors.
    """

    def __init__(
        self, config: TensorDataConfig, *, rank: int, world_size: int, num_classes: int | None
    ) -> None:
        assert 0 <= rank < world_size
        if config.num_workers:
            start_server()
        self.position = 0
        self.batches = open_batches(config, config.shards, num_classes)
        self.faults = Faults(config.max_bad_rate)
        self._config = config
        self._overridden: list[dict[str, Any]] = []
        self._stream = TensorStream(self.batches, rank, world_size)
        self._job = Job(self._stream) if config.num_workers else None
        self._says: Callable[[], str] | None = None
        self._sample = -1

    def __iter__(self) -> Iterator[Batch]:
        """Yield this rank's batches from `position` on, without end.

        Raises ValueError when too many samples fail or a worker hangs; RuntimeError when one dies.
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
        shards = self.batches.shards
        return f"reading {shards.where(self._sample)}" if self._sample >= 0 else ""

    def describe(self) -> dict[str, int]:
        """Counts for people: samples of an epoch."""
        return {"samples": self.batches.shards.num_samples}

    def state_dict(self) -> dict[str, Any]:
        """Return what a resume needs: the position, and what gives it its meaning."""
        state = {"position": self.position, "plan": self._fingerprint()}
        return state | ({"resumed_anyway": self._overridden} if self._overridden else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position; the number of ranks, workers and samples a batch may be another.

        Raises ValueError, unless `data.resume_anyway`, if shards or what is drawn would be others.
        """
        changed = differences(state.get("plan", {}), self._fingerprint())
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

    def _fingerprint(self) -> dict[str, Any]:
        config = self._config
        return {
            "shards": self.batches.shards.fingerprint,
            "seed": config.seed,
            "mean": config.mean,
            "std": config.std,
            "num_classes": self.batches.wanted.num_classes,
            "given_frames": config.given_frames,
        }

    def _batches_from(self, position: int) -> Generator[Batch]:
        config = self._config
        inline = self._stream(self._take_note, 0, 1, position)
        if self._job is None:
            yield from inline
        else:
            first = next(inline)  # or it would wait for a server that still imports
            yield first
            yield from run_workers(
                self._job,
                config.num_workers,
                (first["place"].next_position,),
                prefetch=config.prefetch,
                timeout=config.timeout_s,
                where=self.batches.shards.where,
                waits=self._wait_for,
            )

    def _take_note(self, sample: int) -> None:
        self._sample = sample

    def _wait_for(self, says: Callable[[], str]) -> None:
        self._says = says


def heldout_batches(
    config: TensorDataConfig,
    shards: Sequence[str],
    rank: int,
    world_size: int,
    num_classes: int | None,
) -> Iterator[Batch]:
    """This rank's share of held-out shards, each sample once; equally many batches on every rank.

    Noise and times are the same each time. Raises ValueError for a bad sample.
    """
    batches = open_batches(config, shards, num_classes)
    total, n = batches.shards.num_samples, batches.batch_size
    for begin in range(0, total, n * world_size):
        first = begin + rank * n
        ids = range(min(first, total), min(first + n, total))
        batch = batches.build(ids, [HELDOUT] * len(ids), _nobody)
        for hole in batch["holes"]:
            raise ValueError(hole.message)
        yield batch


def open_batches(
    config: TensorDataConfig, shards: Sequence[str], num_classes: int | None
) -> TensorBatches:
    """Shards of tensors, whose latents have the shape of the first sample's."""
    opened = Shards.open(shards, config.remote.storage)
    for path, index in zip(opened.paths, opened.indexes, strict=True):
        if index.layout != "members" or not set(NAMES) <= set(index.suffixes):
            raise ValueError(
                f"{path}: must hold samples of tensors (json and safetensors), got "
                f"{', '.join(index.suffixes[:4])}; write it with: triptych-data latents"
            )
    where, members = opened.where(0), opened.read_members(0)
    wanted = _wanted(config, load_tensors(members[1], where), where, num_classes)
    decode(members, where, wanted)
    shape, given = wanted.shapes[LATENTS], config.given_frames
    if given and (len(shape) != 4 or given >= shape[1]):
        raise ValueError(
            "data.given_frames: must be fewer than the frames of latents (C, F, H, W), got "
            f"{given} of {shape}; lower it"
        )
    mean, std = (
        _channels(values, name, shape)
        for name, values in (("mean", config.mean), ("std", config.std))
    )
    size, seed = config.batch_size, config.seed
    empty = _empty_text(config, wanted) if TEXT in wanted.shapes else None
    return TensorBatches(opened, size, wanted, mean, std, seed, given, empty)


def _wanted(
    config: TensorDataConfig, first: dict[str, Tensor], where: str, num_classes: int | None
) -> Wanted:
    """What all samples must be like, by the first."""
    names = [LATENTS, *config.features, *([TEXT] if config.text_len else [])]
    for name in names:
        if name not in first:
            raise ValueError(
                f"{where}: must hold a tensor named {name}, got {sorted(first)[:6]}; correct "
                "data.features and data.text_len"
            )
    shapes = {name: tuple(first[name].shape) for name in names}
    shapes[STD] = shapes[LATENTS]
    if config.text_len:
        shapes[TEXT] = (config.text_len, *shapes[TEXT][1:])
    return Wanted(shapes, num_classes)


def _empty_text(config: TensorDataConfig, wanted: Wanted) -> Tensor | None:
    path = config.empty_text
    if path is None:
        return None
    if not path.is_file():
        raise ValueError(f"data.empty_text: must be a file, got '{path}'; correct the path")
    found = load_tensors(memoryview(path.read_bytes()), str(path)).get(TEXT)
    most, width = wanted.shapes[TEXT]
    if found is None or found.ndim != 2 or len(found) > most or found.shape[1] != width:
        got = None if found is None else tuple(found.shape)
        raise ValueError(
            f"{path}: must hold {TEXT} of at most {most} rows of {width}, got {got}; make it with "
            "the encoder of the other texts"
        )
    return found.float()


def _channels(values: list[float], name: str, shape: Shape) -> Tensor:
    if len(values) not in (1, shape[0]):
        raise ValueError(
            f"data.{name}: must be one number, or one for each of the {shape[0]} channels, got "
            f"{len(values)}; correct it"
        )
    return torch.tensor(values).view(-1, *[1] * (len(shape) - 1))


def _nobody(sample: int) -> None:
    """Nobody watches an evaluation's reading."""
