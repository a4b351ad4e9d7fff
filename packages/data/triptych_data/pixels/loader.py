"""Endless batches of images for one rank, prepared by workers, resumable at any position."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from triptych_data.batch import Batch
from triptych_data.pixels.batches import Cut, PixelBatches, find_images
from triptych_data.pixels.config import PixelDataConfig
from triptych_data.rank_loader import RankLoader
from triptych_data.shards.reader import Shards
from triptych_data.tensors.stream import SampleStream, heldout
from triptych_data.workers.pool import start_server


class PixelLoader(RankLoader):
    """The batches of one rank out of the order of images that all ranks share.

    `position` counts the images that all ranks have consumed; it may be set, also while iterating.
    Batches prepared ahead do not count.

    Args:
        config: of the data.
        rank, world_size: of this rank.
        side: of the squares that are cut out, in pixels.
        noise_shape: of the normal numbers that come with each.

    Raises ValueError for shards without index, and those without images.
    """

    def __init__(
        self,
        config: PixelDataConfig,
        *,
        rank: int,
        world_size: int,
        side: int,
        noise_shape: tuple[int, ...],
    ) -> None:
        assert 0 <= rank < world_size
        if config.num_workers:
            start_server()
        self.batches = open_pixels(config, config.shards, side, noise_shape)
        self._depends = {
            "shards": self.batches.shards.fingerprint,
            "seed": config.seed,
            "cut": list(self.batches.cut),
            "noise_shape": list(noise_shape),
        }
        super().__init__(config, self.batches.shards, SampleStream(self.batches, rank, world_size))

    def describe(self) -> dict[str, int]:
        """Counts for people: images of an epoch."""
        return {"images": self.batches.num_samples}

    def where(self, sample: int) -> str:
        """Of an image, that of the sample it is in."""
        return self.shards.where(int(self.batches.places[sample, 0]))

    def identity(self) -> dict[str, Any]:
        """Shards, and what is drawn; the number of images a batch may be another."""
        return {"plan": self._depends}


def heldout_pixels(
    config: PixelDataConfig,
    shards: Sequence[str],
    rank: int,
    world_size: int,
    side: int,
) -> Iterator[Batch]:
    """This rank's share of held-out shards, each image once, its middle; equally many batches on
    every rank. Raises ValueError for a bad image.
    """
    return heldout(open_pixels(config, shards, side, ()), rank, world_size)


def first_pixels(config: PixelDataConfig, shards: Sequence[str], count: int, side: int) -> Tensor:
    """(n, 3, S, S) uint8: the middle of the first `count` images, or of all there are.

    Raises ValueError for a bad image.
    """
    opened = open_pixels(config, shards, side, ())
    some = replace(opened, batch_size=min(count, opened.num_samples))
    pixels: Tensor = next(heldout(some, 0, 1))["pixels"]
    return pixels


def open_pixels(
    config: PixelDataConfig, shards: Sequence[str], side: int, noise_shape: tuple[int, ...]
) -> PixelBatches:
    """Shards of chats, for their images."""
    opened = Shards.open(shards, config.remote.storage)
    places = find_images(opened)
    if not len(places):
        raise ValueError(
            f"data.shards: must hold images, got none in {', '.join(shards)}; name other shards"
        )
    shorter = side if config.shorter_side is None else config.shorter_side
    if shorter < side:
        raise ValueError(
            f"data.shorter_side: must be at least the model's {side} pixels, got {shorter}; raise "
            "it, or leave it out"
        )
    cut = Cut(side, shorter, config.crop, config.flip)
    return PixelBatches(opened, places, config.batch_size, cut, noise_shape, config.seed)
