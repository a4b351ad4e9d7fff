"""The part of a packed row that one rank of a sequence group computes, cut on the host."""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .sequence import SequenceGroup

_TOKENS = ("input_ids", "shift_labels", "position_ids", "target_weights")


TokensOf = Callable[[Tensor], Tensor]
"""Of recordings of so many frames (num_audios,) int64, how many tokens each becomes."""


def take_part(
    batch: Mapping[str, Any], group: SequenceGroup, tokens_of: TokensOf | None = None
) -> Mapping[str, Any]:
    """This rank's part of a row of T tokens, N ranks holding T/N each.

    Labels were shifted before, so no target is lost where parts meet. `num_targets` is the part's;
    cu_seqlens and max_seqlen stay the row's, since attention sees all of it. Of the images the
    rank gets a share to run through the tower, see `image_part`, and of recordings as well, for
    which tokens_of is needed.
    """
    if group.size == 1:
        return batch
    seq_len = batch["input_ids"].shape[-1]
    assert seq_len % group.size == 0, "the stage's configuration is checked for that"
    length = seq_len // group.size
    tokens = slice(group.rank * length, (group.rank + 1) * length)
    part = dict(batch) | {name: batch[name][..., tokens] for name in _TOKENS if name in batch}
    labels = int((part["shift_labels"] != -100).sum())
    if "num_masked" in batch:  # the row's divisor, once
        part |= {"num_masked": labels, "num_targets": 0 if group.rank else batch["num_targets"]}
    else:
        part["num_targets"] = labels
    if "pixel_values" in batch:
        for name in ("pixel_values", "image_grid_thw", "vision_cu_seqlens"):
            del part[name]
        part |= image_part(batch, length, group)
    if "audio_features" in batch:
        assert tokens_of is not None
        for name in ("audio_features", "audio_lengths"):
            del part[name]
        part |= audio_part(batch, length, group, tokens_of)
    return part


def image_part(batch: Mapping[str, Any], length: int, group: SequenceGroup) -> dict[str, Any]:
    """What of a row's images a rank computes, and how the features find their tokens.

    Each rank runs the tower on images that stand together, with about 1/N of all patches:
    `pixel_values`, `image_grid_thw` and `vision_cu_seqlens` of those, absent where it has none.
    `image_positions` are those of the image tokens in its T/N = length tokens, whoever computes
    their features: `image_sends` and `image_receives` (N,) count them by rank. Where tokens are
    made by `image_taps`, every rank gets all features.
    """
    n, rank = group.size, group.rank
    grids, positions = batch["image_grid_thw"], batch["image_positions"]
    patches = grids.prod(1)
    cuts = _cut_by_weight(patches, n)  # rank r runs images cuts[r] to cuts[r + 1]
    patch_cuts = [_sum_before(patches, cut) for cut in cuts]
    # As many tokens a patch in every image; and so it makes features made[r] to made[r + 1]
    made = [cut * len(positions) // patch_cuts[-1] for cut in patch_cuts]
    held = torch.searchsorted(positions, torch.arange(n + 1) * length).tolist()  # and holds these
    mine = slice(held[rank], held[rank + 1])
    part: dict[str, Any] = {
        "image_positions": positions[mine] - rank * length,
        "image_sends": [_overlap(made, rank, held, other) for other in range(n)],
        "image_receives": [_overlap(made, other, held, rank) for other in range(n)],
    }
    if "image_taps" in batch:
        part |= {name: batch[name][mine] for name in ("image_taps", "image_tap_weights")}
        counts = [end - start for start, end in pairwise(patch_cuts)]  # a feature a patch
        part |= {"image_sends": [counts[rank]] * n, "image_receives": counts}
    first, last = cuts[rank], cuts[rank + 1]
    if first < last:
        frames = [_sum_before(grids[:, 0], cut) for cut in (first, last)]
        ends = batch["vision_cu_seqlens"][frames[0] : frames[1] + 1]
        part |= {
            "pixel_values": batch["pixel_values"][patch_cuts[rank] : patch_cuts[rank + 1]],
            "image_grid_thw": grids[first:last],
            "vision_cu_seqlens": ends - ends[0],
        }
    return part


def audio_part(
    batch: Mapping[str, Any], length: int, group: SequenceGroup, tokens_of: TokensOf
) -> dict[str, Any]:
    """The same of a row's recordings, by their frames: `audio_features`, `audio_lengths`,
    `audio_positions`, `audio_sends` and `audio_receives`."""
    n, rank = group.size, group.rank
    lengths, positions = batch["audio_lengths"], batch["audio_positions"]
    rows = lengths + (len(batch["audio_features"]) - int(lengths.sum())) // len(lengths)
    tokens = tokens_of(lengths)
    cuts = _cut_by_weight(lengths, n)
    made = [_sum_before(tokens, cut) for cut in cuts]
    held = torch.searchsorted(positions, torch.arange(n + 1) * length).tolist()
    part: dict[str, Any] = {
        "audio_positions": positions[held[rank] : held[rank + 1]] - rank * length,
        "audio_sends": [_overlap(made, rank, held, other) for other in range(n)],
        "audio_receives": [_overlap(made, other, held, rank) for other in range(n)],
    }
    first, last = cuts[rank], cuts[rank + 1]
    if first < last:
        begin, end = _sum_before(rows, first), _sum_before(rows, last)
        part |= {
            "audio_features": batch["audio_features"][begin:end],
            "audio_lengths": lengths[first:last],
        }
    return part


def _cut_by_weight(weights: Tensor, parts: int) -> list[int]:
    """Where to cut a list into runs of about equal weight: (parts + 1) indices from 0 on.

    An element belongs to the run in which its middle lies.
    """
    ends = weights.cumsum(0)
    owners = (2 * ends - weights) * parts // (2 * ends[-1])
    return torch.searchsorted(owners, torch.arange(parts + 1)).tolist()


def _sum_before(values: Tensor, index: int) -> int:
    return int(values[:index].sum())


def _overlap(made: list[int], maker: int, held: list[int], holder: int) -> int:
    """How many features one rank makes and another holds the tokens of."""
    begin = max(made[maker], held[holder])
    return max(0, min(made[maker + 1], held[holder + 1]) - begin)
