"""Endless batches of latents for one rank, prepared by workers, resumable at any position."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from triptych_data.batch import Batch
from triptych_data.rank_loader import RankLoader
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
from triptych_data.tensors.stream import SampleStream, TensorBatches, heldout
from triptych_data.workers.pool import start_server


class TensorLoader(RankLoader):
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
        self.batches = open_batches(config, config.shards, num_classes)
        self._depends = {
            "shards": self.batches.shards.fingerprint,
            "seed": config.seed,
            "mean": config.mean,
            "std": config.std,
            "num_classes": num_classes,
            "given_frames": config.given_frames,
        } | ({"text_field": config.text_field} if config.text_field else {})
        stream = SampleStream(self.batches, rank, world_size)
        super().__init__(config, self.batches.shards, stream)

    def describe(self) -> dict[str, int]:
        """Counts for people: samples of an epoch."""
        return {"samples": self.shards.num_samples}

    def identity(self) -> dict[str, Any]:
        """Shards, and what is drawn; the number of samples a batch may be another."""
        return {"plan": self._depends}


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
    return heldout(open_batches(config, shards, num_classes), rank, world_size)


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
            f"{config.KEY}.given_frames: must be fewer than the frames of latents (C, F, H, W), "
            f"got {given} of {shape}; lower it"
        )
    mean, std = (
        _channels(values, f"{config.KEY}.{name}", shape)
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
                f"{config.KEY}.features and {config.KEY}.text_len"
            )
    shapes = {name: tuple(first[name].shape) for name in names}
    shapes[STD] = shapes[LATENTS]
    if config.text_len:
        shapes[TEXT] = (config.text_len, *shapes[TEXT][1:])
    return Wanted(shapes, num_classes, config.text_field)


def _empty_text(config: TensorDataConfig, wanted: Wanted) -> Tensor | None:
    path = config.empty_text
    if path is None:
        return None
    if not path.is_file():
        raise ValueError(f"{config.KEY}.empty_text: must be a file, got '{path}'; correct it")
    found = load_tensors(memoryview(path.read_bytes()), str(path)).get(TEXT)
    most, width = wanted.shapes[TEXT]
    if found is None or found.ndim != 2 or len(found) > most or found.shape[1] != width:
        got = None if found is None else tuple(found.shape)
        raise ValueError(
            f"{path}: must hold {TEXT} of at most {most} rows of {width}, got {got}; make it with "
            "the encoder of the other texts"
        )
    return found.float()


def _channels(values: list[float], key: str, shape: Shape) -> Tensor:
    if len(values) not in (1, shape[0]):
        raise ValueError(
            f"{key}: must be one number, or one for each of the {shape[0]} channels, got "
            f"{len(values)}; correct it"
        )
    return torch.tensor(values).view(-1, *[1] * (len(shape) - 1))
