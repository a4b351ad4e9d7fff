"""Documents of words and latents put before a packed row of chats."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..diffusion.config import ObjectiveConfig
from ..diffusion.objective import draw_times
from .config import BagelConfig
from .layout import BUCKET, lay_out
from .settings import DrawConfig

IGNORED = -100


@dataclass(frozen=True)
class JoinImages:
    """Makes a document of each sample of latents: <|im_start|> words <|im_end|>, and the image.

    encode gives the ids of words. Time and noise of a sample are drawn with it: `times` uniform in
    [0, 1) become sigmoids of a normal (arXiv 2505.14683, section 4; the official code), shifted by
    config.json's timestep_shift.
    """

    config: BagelConfig
    settings: DrawConfig
    encode: Callable[[str], Sequence[int]]
    pad_token_id: int

    def __call__(self, row: Mapping[str, Any], images: Mapping[str, Any]) -> dict[str, Any]:
        """A row of constant length: these documents, the chats, and padding; laid out.

        row: of `triptych_data.batch.collate`; images: of `TensorBatches.build`, with `texts`. Adds

        - `latents`, `latent_noise` (L, latent_dim) fp32, `latent_times` (L,) fp32, 1 is noise;
          `latent_positions` (L,) int64; `latent_grids` (images, 2) int64
        - `num_second_targets`: L; `image_weight`

        Raises ValueError for latents that are not of this model's autoencoder.
        """
        latents, noise = (patches_of(images[name], self.config) for name in ("latents", "noise"))
        there = images["weights"].nonzero().flatten().tolist()
        height, width = (n // self.config.latent_patch_size for n in images["latents"].shape[2:])
        count = height * width
        drops = (images["drops"][there] < self.settings.text_dropout).tolist()
        documents = [
            image_document(self.config, [] if drop else self._words(text), count)
            for drop, text in zip(drops, images["texts"], strict=True)
        ]
        joined = self._before(row, documents, len(images["weights"]), count)
        if not there:
            return lay_out(joined, self.config)
        ends = torch.tensor([len(ids) for ids in documents]).cumsum(0) - 1  # of images, their last
        starts = ends - count
        times = 1 - draw_times(
            images["times"][there],
            ObjectiveConfig(times="logit_normal", shift=self.config.timestep_shift),
        )
        joined |= {
            "latents": latents[there].flatten(0, 1),
            "latent_noise": noise[there].flatten(0, 1),
            "latent_times": times.repeat_interleave(count),
            "latent_positions": (starts[:, None] + torch.arange(count)).flatten(),
            "latent_grids": torch.tensor([[height, width]] * len(there)),
            "num_second_targets": count * len(there),
            "image_weight": self.settings.weight,
        }
        return lay_out(joined, self.config)

    def _words(self, text: str) -> list[int]:
        return list(self.encode(text))[: self.settings.text_len]

    def _before(
        self, row: Mapping[str, Any], documents: Sequence[list[int]], slots: int, count: int
    ) -> dict[str, Any]:
        """The row behind the documents, and padding for what these could be longer."""
        lengths = [len(ids) for ids in documents]
        drawn = sum(lengths)
        padding = slots * slot_tokens(self.settings, count) - drawn
        first = torch.tensor([ids for document in documents for ids in document], dtype=torch.int64)
        tail = torch.full((padding,), self.pad_token_id)
        starts = torch.tensor([0, *lengths]).cumsum(0)[:-1]
        chats = row["cu_seqlens"].long() + drawn
        bounds = torch.cat([starts, chats, chats[-1:] + padding] if padding else [starts, chats])
        none, nor = (torch.full_like(part, IGNORED) for part in (first, tail))
        longest = -(-max([*lengths, padding]) // BUCKET) * BUCKET
        joined = dict(row) | {
            "input_ids": torch.cat([first, row["input_ids"][0], tail])[None],
            "shift_labels": torch.cat([none, row["shift_labels"][0], nor])[None],
            "cu_seqlens": bounds.int(),
            "max_seqlen": max(row["max_seqlen"], longest),
            "num_tokens": row["num_tokens"] + drawn,
            "num_second_targets": 0,
        }
        if "image_positions" in row:
            joined["image_positions"] = row["image_positions"] + drawn
        return joined


def slot_tokens(settings: DrawConfig, latents: int) -> int:
    """Tokens that a row has room for, of an image of so many latents with its words."""
    return settings.text_len + latents + 4  # around words, and around the image


def image_document(config: BagelConfig, words: Sequence[int], count: int) -> list[int]:
    """Token ids of words, if there are any, and of an image of count latents."""
    said = [config.text_start_token_id, *words, config.text_end_token_id] if words else []
    image = [config.image_token_id] * count
    return [*said, config.vision_start_token_id, *image, config.vision_end_token_id]


def patches_of(latents: Tensor, config: BagelConfig) -> Tensor:
    """(N, C, H, W) → (N, patches, latent_dim), row by row, each value with its channels.

    Raises ValueError for latents that are not of this model's autoencoder.
    """
    patch, channels = config.latent_patch_size, config.vae_config["z_channels"]
    n, found, *sides = latents.shape
    if found != channels or len(sides) != 2 or any(side % patch for side in sides):
        raise ValueError(
            f"generation.data: latents must have {channels} channels and sides that are "
            f"multiples of {patch}, as config.json says, got {(found, *sides)}; encode images "
            "with the model's autoencoder"
        )
    cut = latents.view(n, channels, sides[0] // patch, patch, sides[1] // patch, patch)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(n, -1, config.latent_dim)
