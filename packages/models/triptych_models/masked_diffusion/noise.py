"""A packed row of next tokens made one of masked diffusion, on the host.

Of each document t is drawn, uniform in [0, 1), and each token that may be masked is, with
probability p = min_p + (1 - min_p) t. Tokens that may are the targets of next-token training:
answers of chats, documents. With predict=same also a document's first token if the second is one.

All of it comes from (seed, sample, epoch): on whatever rank, after whatever resume, the same bits.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .config import DiffusionConfig

IGNORED = -100


@dataclass(frozen=True)
class MaskRow:
    """Masks tokens of a row; to be called where rows are made, in data workers.

    mask_token_id stands for a masked token; epoch None is that of held-out samples.
    """

    config: DiffusionConfig
    mask_token_id: int
    seed: int

    def __call__(self, batch: Mapping[str, Any], epoch: int | None) -> dict[str, Any]:
        """The row with `input_ids` masked, `shift_labels` of masked tokens alone and, beside them,

        - `target_weights` (1, T) fp32, 0 where there is no label
        - `num_masked`: labels that are not -100
        - `num_targets`: what the loss is divided by, see `DiffusionConfig.divide_by`
        """
        ids, labels = batch["input_ids"][0], batch["shift_labels"][0]
        noisy, targets = ids.clone(), torch.full_like(labels, IGNORED)
        weights = torch.zeros(len(ids), dtype=torch.float32)
        bounds = batch["cu_seqlens"].tolist()
        num_maskable = num_masked = 0
        for document, sample in enumerate(batch["sample_ids"]):  # the padding tail has none
            span = slice(bounds[document], bounds[document + 1])
            may = maskable(labels[span], self.config.predict)
            p, masked = draw_mask(may, self.config.min_p, self.seed, sample, epoch)
            noisy[span][masked] = self.mask_token_id
            weight = weigh(masked, p, self.config)
            at = masked if self.config.predict == "same" else masked.roll(-1)
            targets[span][at] = ids[span][masked]
            weights[span][at] = weight[masked].float()
            num_maskable += int(may.sum())
            num_masked += int(masked.sum())
        by_masked = self.config.divide_by == "masked"
        return dict(batch) | {
            "input_ids": noisy[None],
            "shift_labels": targets[None],
            "target_weights": weights[None],
            "num_targets": num_masked if by_masked else num_maskable,
            "num_masked": num_masked,
        }


def maskable(labels: Tensor, predict: str) -> Tensor:
    """Which tokens of a document may be masked: (n,) bool, of its shifted labels (n,)."""
    may = torch.zeros(len(labels), dtype=torch.bool)
    may[1:] = labels[:-1] != IGNORED  # the last label's token is another piece's, or none
    if predict == "same":
        may[0] = labels[0] != IGNORED
    return may


def draw_mask(
    may: Tensor, min_p: float, seed: int, sample: int, epoch: int | None
) -> tuple[float, Tensor]:
    """p, and which of the tokens that may are masked: (n,) bool."""
    name = f"{seed} {sample} {epoch}".encode()
    digest = hashlib.blake2b(name, digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest) >> 1)
    t = float(torch.rand((), generator=generator, dtype=torch.float64))
    p = min_p + (1 - min_p) * t
    return p, may & (torch.rand(len(may), generator=generator, dtype=torch.float64) < p)


def weigh(masked: Tensor, p: float, config: DiffusionConfig) -> Tensor:
    """What the loss of each masked token is multiplied by: (n,) fp64, of masked (n,) bool."""
    if config.weight == "context":
        return context_weights(masked, config.context_p)
    weight = 1 / p if config.weight == "inverse" else 1.0
    return torch.full((len(masked),), weight, dtype=torch.float64)


def context_weights(masked: Tensor, c: float) -> Tensor:
    """Of token i the sum of c (1 - c)^(|i - j| - 1) / 2 over all j ≠ i that are not masked.

    Dream's CART. As sums that fade by 1 - c from token to token, from either side.
    """
    seen = (~masked).tolist()

    def before(tokens: list[bool]) -> list[float]:
        sums = accumulate(tokens, lambda held, token: held * (1 - c) + token, initial=0.0)
        return list(sums)[:-1]

    left, right = before(seen), before(seen[::-1])[::-1]
    return c / 2 * (torch.tensor([left, right], dtype=torch.float64).sum(0))
