"""How a packed row of text and images is laid out for Bagel: found once, on the host.

Of each document text is causal, and an image, with the two tokens around it, sees all of itself.
An image that is being denoised is seen by itself alone (arXiv 2505.14683, section 2.3). So a
document falls into segments, each of which sees what of the document before it can be seen, and of
itself either what is before or all: two calls of `attention`, whose keys are gathered, compute
exactly that, without a mask and without a pair that is not looked at.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .config import BagelConfig

BUCKET = 256  # lengths are rounded up to multiples, so that compiled kernels see few of them
_REMEDIES = {
    "vit_max_num_patch_per_side": "lower data.max_pixels",
    "max_latent_size": "encode smaller images for generation.data.shards",
}


class Block(NamedTuple):
    """An image within a row, the tokens around it included."""

    start: int
    end: int
    is_noisy: bool


@dataclass(frozen=True)
class LayOutRow:
    """`lay_out` as what is done last to a row of chats, where rows are made."""

    config: BagelConfig

    def __call__(self, batch: Mapping[str, Any], epoch: int | None) -> dict[str, Any]:
        return lay_out(batch, self.config)


def lay_out(batch: Mapping[str, Any], config: BagelConfig) -> dict[str, Any]:
    """The packed row with what Bagel must know of its images; a row that has it stays as it is.

    - `position_ids` (1, T) int64: all tokens of an image have one
    - `token_order` (T,) int64: the row's tokens, those of latents last; `num_latents` of them
    - `causal_queries`, `mutual_queries`, `causal_keys`, `mutual_keys`: places in that order;
      `causal_bounds`, `mutual_bounds` (2, segments + 1) int32, of queries and keys; the lengths
      `causal_longest`, `mutual_longest` bound keys; `attended_order` (T,): where each token's
      result lies behind both calls. None of them in a row of text alone.
    - `patch_places` (P,), `latent_places` (L,) int64: rows of the tables of positions

    batch: as `triptych_data.batch.collate` makes it, on the host, maybe with `latent_positions`
    (L,), `latent_grids` (images, 2) and `latent_times` (L,). Raises ValueError for an image that is
    larger than the tables.
    """
    if "token_order" in batch:
        return dict(batch)
    length = batch["input_ids"].shape[1]
    bounds = batch["cu_seqlens"].tolist()
    blocks = find_blocks(batch, config)
    latents = _ints(batch.get("latent_positions"))
    is_latent = np.zeros(length, dtype=bool)
    is_latent[latents] = True
    order = np.concatenate([np.flatnonzero(~is_latent), latents])
    made: dict[str, Any] = {
        "position_ids": torch.from_numpy(_positions(bounds, blocks))[None],
        "token_order": torch.from_numpy(order),
        "num_latents": len(latents),
        "patch_places": _places(
            [(h, w) for _, h, w in _rows(batch.get("image_grid_thw"))],
            config.vit_max_num_patch_per_side,
            "vit_max_num_patch_per_side",
        ),
        "latent_places": _places(
            _rows(batch.get("latent_grids")), config.max_latent_size, "max_latent_size"
        ),
    }
    return dict(batch) | made | (_attention(bounds, blocks, order) if blocks else {})


def find_blocks(batch: Mapping[str, Any], config: BagelConfig) -> list[Block]:
    """The images of a row, in its order."""
    ids = batch["input_ids"][0].tolist()
    ends = {*batch["cu_seqlens"].tolist()}

    def block(start: int, end: int, is_noisy: bool) -> Block:
        has_start = start not in ends and ids[start - 1] == config.vision_start_token_id
        has_end = end not in ends and ids[end] == config.vision_end_token_id
        return Block(start - has_start, end + has_end, is_noisy)

    seen = _runs(batch.get("image_positions"), [h * w for _, h, w in _image_rows(batch)])
    sizes = [h * w for h, w in _rows(batch.get("latent_grids"))]
    drawn = _runs(batch.get("latent_positions"), sizes)
    firsts = np.cumsum([0, *sizes])[:-1]
    noisy = [bool(batch["latent_times"][at] > 0) for at in firsts]
    found = [block(*run, False) for run in seen]
    found += [block(*run, is_noisy) for run, is_noisy in zip(drawn, noisy, strict=True)]
    return sorted(found)


def _image_rows(batch: Mapping[str, Any]) -> list[list[int]]:
    return _rows(batch.get("image_grid_thw"))


def _runs(positions: Tensor | None, sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Where images of these many tokens begin and end in the row."""
    held = _ints(positions)
    starts = np.cumsum([0, *sizes])[:-1]
    runs = [(int(held[at]), int(held[at]) + n) for at, n in zip(starts, sizes, strict=True)]
    assert len(held) == sum(sizes), "positions and sizes are of the same images"
    return runs


def _positions(bounds: list[int], blocks: Sequence[Block]) -> np.ndarray:
    """(T,) int64: counted from each document's begin, an image as one."""
    steps = np.ones(bounds[-1], dtype=np.int64)
    for block in blocks:
        steps[block.start + 1 : block.end] = 0
    places = np.cumsum(steps)
    starts = np.array(bounds[:-1])[np.diff(bounds) > 0]
    lengths = np.diff(bounds)[np.diff(bounds) > 0]
    return places - np.repeat(places[starts], lengths)


def _places(sizes: Sequence[Sequence[int]], side: int, name: str) -> Tensor:
    """Rows of a table of side x side positions, for the patches of images (h, w), row by row."""
    found = [np.zeros(0, dtype=np.int64)]
    for h, w in sizes:
        if max(h, w) > side:
            raise ValueError(
                f"model.path: images must have at most {side} patches a side, config.json's "
                f"{name}, got {h} x {w}; {_REMEDIES[name]}"
            )
        found.append((np.arange(h)[:, None] * side + np.arange(w)).reshape(-1))
    return torch.from_numpy(np.concatenate(found))


def _attention(bounds: list[int], blocks: Sequence[Block], order: np.ndarray) -> dict[str, Any]:
    place = np.empty_like(order)  # of the row's tokens in the order
    place[order] = np.arange(len(order))
    made: dict[str, Any] = {}
    queries: dict[str, list[np.ndarray]] = {"causal": [], "mutual": []}
    keys: dict[str, list[np.ndarray]] = {"causal": [], "mutual": []}
    remaining = list(blocks)
    for start, end in pairwise(bounds):
        seen = np.zeros(0, dtype=np.int64)
        while start < end:
            block = remaining[0] if remaining and remaining[0].start < end else None
            is_block = block is not None and block.start == start
            stop = block.end if block and is_block else block.start if block else end
            own = place[start:stop]
            kind = "mutual" if is_block else "causal"
            queries[kind].append(own)
            keys[kind].append(np.concatenate([seen, own]))
            if block is None or not (is_block and block.is_noisy):
                seen = keys[kind][-1]
            if is_block:
                remaining.pop(0)
            start = stop
    for kind in queries:
        lengths = [[len(part) for part in parts] for parts in (queries[kind], keys[kind])]
        made[f"{kind}_queries"] = _joined(queries[kind])
        made[f"{kind}_keys"] = _joined(keys[kind])
        made[f"{kind}_bounds"] = torch.tensor([[0, *np.cumsum(n)] for n in lengths]).int()
        made[f"{kind}_longest"] = -(-max(lengths[1], default=1) // BUCKET) * BUCKET
    behind = torch.cat([made["causal_queries"], made["mutual_queries"]])
    made["attended_order"] = behind.argsort()
    return made


def _joined(parts: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *parts]))


def _ints(positions: Tensor | None) -> np.ndarray:
    return np.zeros(0, dtype=np.int64) if positions is None else positions.numpy()


def _rows(grids: Tensor | None) -> list[list[int]]:
    return [] if grids is None else grids.tolist()
