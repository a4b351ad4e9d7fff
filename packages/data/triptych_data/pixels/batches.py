"""Batches of images and of what is random of them: what runs in data workers, or inline."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from triptych_data.batch import Batch
from triptych_data.faults import BadSample, Hole, reason_of
from triptych_data.media.images import check_ratio, decode_image, resize
from triptych_data.plan.permutation import stream_key
from triptych_data.sample import KINDS, media_parts
from triptych_data.shards.reader import Shards
from triptych_data.tensors.stream import HELDOUT
from triptych_data.workers.server import Note

USES = 3  # of an image by a discriminator: as made, as made and rounded, as it is
NUMBERS = 7  # that decide how an image is changed for one of them


class Cut(NamedTuple):
    """How a square is cut out of every image."""

    side: int
    shorter_side: int
    """of the whole image, before"""
    anywhere: bool
    flip: bool


@dataclass(frozen=True, eq=False)
class PixelBatches:
    """Reads images and draws what is random of them, from (seed, image, epoch) alone.

    So all of it is the same on any number of ranks and workers, and after a resume.
    """

    shards: Shards
    places: np.ndarray
    """(K, 2) int64: the sample of each image, and its place among the sample's images"""
    batch_size: int
    cut: Cut
    noise_shape: tuple[int, ...]
    seed: int

    @property
    def num_samples(self) -> int:
        """Images."""
        return len(self.places)

    def build(self, ids: Sequence[int], epochs: Sequence[int], note: Note) -> Batch:
        """The batch of the images `ids`, at most N, each in its epoch; those left out are in
        `holes`.

        - `pixels` (N, 3, S, S) uint8; `noise` (N, …) fp32 normal, of the shape asked for; zeros
          where there is no image
        - `levels` (N,) and `draws` (N, 3, 7) fp32 in [0, 1); `weights` (N,) fp32, 1, or 0 without
          an image
        - `num_targets`, `num_tokens`: images that are there
        - `sample_keys`, `sample_ids` of those
        """
        count, side = self.batch_size, self.cut.side
        pixels = torch.zeros(count, 3, side, side, dtype=torch.uint8)
        noise = torch.zeros(count, *self.noise_shape)
        levels, weights = torch.zeros(count), torch.zeros(count)
        draws = torch.zeros(count, USES, NUMBERS)
        holes: list[Hole] = []
        kept: list[int] = []
        for row, (image, epoch) in enumerate(zip(ids, epochs, strict=True)):
            sample, number = self.places[image].tolist()
            note(sample)
            found = self._read(sample, number)
            if isinstance(found, Hole):
                holes.append(found)
                continue
            random = _generator(self.seed, image, epoch)
            where = random.random(3)
            if epoch == HELDOUT:
                where = np.array([0.5, 0.5, 1.0])
            pixels[row] = cut_out(found, self.cut, *where.tolist())
            levels[row] = float(random.random(dtype=np.float32))
            draws[row] = torch.from_numpy(random.random((USES, NUMBERS), dtype=np.float32))
            noise[row] = torch.from_numpy(
                np.asarray(random.standard_normal(self.noise_shape, np.float32))
            )
            weights[row] = 1
            kept.append(image)
        return {
            "pixels": pixels,
            "noise": noise,
            "levels": levels,
            "draws": draws,
            "weights": weights,
            "num_targets": len(kept),
            "num_tokens": len(kept),
            "sample_keys": [self.shards.keys(self.places[image, 0].item()) for image in kept],
            "sample_ids": kept,
            "holes": holes,
        }

    def _read(self, sample: int, number: int) -> Tensor | Hole:
        try:
            raw = self.shards.read(sample)
            members = [member for kind, member in media_parts(raw.json) if kind == "image"]
            image = decode_image(raw.media[members[number]])
            check_ratio(image.shape[2], image.shape[1])
            return image
        except BadSample as error:
            return self._hole(sample, error)
        except ValueError as error:
            message = f"{self.shards.where(sample)}: {error}"
            return self._hole(sample, BadSample(message, "damaged"))

    def _hole(self, sample: int, error: BadSample) -> Hole:
        return Hole(self.shards.keys(sample), "shards", reason_of(error), str(error), sample)


def cut_out(image: Tensor, cut: Cut, down: float, right: float, turn: float) -> Tensor:
    """(3, H, W) uint8 -> (3, S, S): resized, then the square so far down and right, in [0, 1].

    turn below 0.5 flips it, if images are flipped at all.
    """
    _, height, width = image.shape
    scale = cut.shorter_side / min(height, width)
    image = resize(image, round(height * scale), round(width * scale))
    if not cut.anywhere:
        down = right = 0.5
    top = int(down * (image.shape[1] - cut.side + 1))
    left = int(right * (image.shape[2] - cut.side + 1))
    square = image[:, top : top + cut.side, left : left + cut.side]
    return square.flip(2) if cut.flip and turn < 0.5 else square


def find_images(shards: Shards) -> np.ndarray:
    """(K, 2) int64: the sample of each image, and its place among the sample's images."""
    is_image = shards.media.kind == KINDS.index("image")
    rows = np.flatnonzero(is_image)
    before = np.cumsum(is_image) - is_image
    samples = np.searchsorted(shards.media_start, rows, side="right") - 1
    return np.stack([samples, before[rows] - before[shards.media_start[samples]]], 1)


def _generator(seed: int, image: int, epoch: int) -> np.random.Generator:
    key = np.array([stream_key(seed, "pixels", epoch), image], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))
