"""Best-fit packing of a stream of lengths with a bounded number of open packs."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packs:
    """Packs as one array: pack p, `packs[p]`, is `items[starts[p]:starts[p + 1]]`.

    `items (N,) int64` are indices into the packed lengths, `starts (num_packs + 1,) int64`.
    """

    items: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, pack: int) -> np.ndarray:
        return self.items[self.starts[pack] : self.starts[pack + 1]]


def pack_lengths(
    lengths: np.ndarray,
    capacity: int,
    *,
    open_bins: int = 16,
    patches: np.ndarray | None = None,
    max_patches: int | None = None,
) -> Packs:
    """Put each length, in order, into the open pack it fills best; return packs as they close.

    At most `open_bins` packs are open: when one more is needed the fullest closes. A full pack
    closes at once, the rest at the end, fullest first. With `max_patches`, the `patches (N,)` of a
    pack add up to at most that.

    On the reference mixture of docs (mean 762 tokens in 8192) 16 open bins leave 0.12 % padding,
    as much as best-fit-decreasing on 5,000-sample buffers, and keep the order local.
    """
    assert not len(lengths) or 0 < lengths.min() <= lengths.max() <= capacity
    if max_patches is None:
        bins = _pack(lengths.tolist(), capacity, open_bins)
    else:
        assert patches is not None and (not len(patches) or patches.max() <= max_patches)
        bins = _pack_bounded(lengths.tolist(), capacity, open_bins, patches.tolist(), max_patches)
    starts = np.zeros(len(bins) + 1, dtype=np.int64)
    starts[1:] = np.cumsum([len(items) for items in bins])
    items = np.fromiter((i for items in bins for i in items), dtype=np.int64, count=int(starts[-1]))
    return Packs(items, starts)


def _pack(lengths: Sequence[int], capacity: int, open_bins: int) -> list[list[int]]:
    closed: list[list[int]] = []
    room: list[int] = []  # ascending: the fullest bin first
    bins: list[list[int]] = []
    for item, length in enumerate(lengths):
        at = bisect_left(room, length)
        if at < len(room):
            left = room.pop(at) - length
            items = bins.pop(at)
            items.append(item)
        else:
            if len(room) == open_bins:
                room.pop(0)
                closed.append(bins.pop(0))
            left, items = capacity - length, [item]
        if left:
            at = bisect_left(room, left)
            room.insert(at, left)
            bins.insert(at, items)
        else:
            closed.append(items)
    return closed + bins


def _pack_bounded(
    lengths: Sequence[int], capacity: int, open_bins: int, patches: Sequence[int], max_patches: int
) -> list[list[int]]:
    closed: list[list[int]] = []
    bins: list[tuple[int, int, int, list[int]]] = []  # room, when it opened, patches left, items
    for item, (length, size) in enumerate(zip(lengths, patches, strict=True)):
        at = bisect_left(bins, (length,))
        while at < len(bins) and bins[at][2] < size:
            at += 1
        if at < len(bins):
            room, opened, patches_left, items = bins.pop(at)
        else:
            if len(bins) == open_bins:
                closed.append(bins.pop(0)[3])
            room, opened, patches_left, items = capacity, item, max_patches, []
        items.append(item)
        if room > length:
            insort(bins, (room - length, opened, patches_left - size, items))
        else:
            closed.append(items)
    return closed + [items for *_, items in bins]
