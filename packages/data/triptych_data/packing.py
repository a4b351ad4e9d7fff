"""Packing a window of samples: in the order they come, closed by the best fit, under budgets."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

_CLOSING = 4  # a pack is closed when a quarter of it is left: enough for some document to fit
_DRAWN = 7 / 8  # of the items come in their order; the last ones longest first, to leave no gaps
_MOST_CLOSING = 8  # items that close a pack under budgets: else they use up those that need nothing


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


class Budget(NamedTuple):
    """What else is bounded: the `sizes (N,)` of a pack's items add up to at most `limit`."""

    sizes: np.ndarray
    limit: int


def pack_lengths(lengths: np.ndarray, capacity: int, budgets: Sequence[Budget] = ()) -> Packs:
    """Put items of `lengths (N,)`, in [1, capacity], into packs of at most `capacity`.

    A pack takes items as they come until a quarter of it is left, then the longest that still fit;
    the last eighth of the items only closes packs or is packed longest first. Items that are alike
    are interchangeable: the first of them comes first.

    Best-fit-decreasing for all items wastes as little, but puts all short documents into the same
    packs: on the reference mixture (mean 755 tokens in 8192) both waste 0.08 %, with 10.8 ± 5
    documents a pack here and ± 13 there. 1.6 M items/s on one core; 0.5 M under a budget that binds
    (one that all items together keep costs nothing).
    """
    assert not len(lengths) or 0 < lengths.min() <= lengths.max() <= capacity
    assert all(not len(b.sizes) or 0 <= b.sizes.min() <= b.sizes.max() <= b.limit for b in budgets)
    budgets = [budget for budget in budgets if budget.sizes.sum() > budget.limit]
    fields = _Fields.of([capacity, *(budget.limit for budget in budgets)])
    keys = fields.join([lengths, *(budget.sizes for budget in budgets)])
    is_free = (keys & fields.mask_of_needs) == 0
    free, free_items = _rows(keys, np.flatnonzero(is_free))
    bound, bound_items = _rows(keys, np.flatnonzero(~is_free), first_slot=len(free_items))
    drawn = keys[: int(_DRAWN * len(keys))].tolist()
    slots, starts = _fill(free, bound, drawn, fields)
    items = np.concatenate([free_items, bound_items])
    return Packs(items[np.array(slots, dtype=np.int64)], np.array(starts, dtype=np.int64))


class _Fields(NamedTuple):
    """Length and needs of an item in one integer, length highest, with a spare bit above each.

    When all spare bits of what is left of a pack are set, taking an item away is one subtraction,
    and it fits if they are still set: no field borrowed.
    """

    full: int
    """an empty pack's room and limits, spare bits set"""
    spare: int
    """the spare bits"""
    shifts: list[int]

    @classmethod
    def of(cls, limits: Sequence[int]) -> "_Fields":
        full = spare = shift = 0
        shifts = []
        for limit in reversed(limits):
            shifts.append(shift)
            full |= limit << shift
            shift += limit.bit_length()
            spare |= 1 << shift
            shift += 1
        assert shift < 64, "the configuration bounds them"
        return cls(full | spare, spare, shifts[::-1])

    @property
    def mask_of_needs(self) -> int:
        return (1 << self.shifts[0]) - 1

    @property
    def closing(self) -> int:
        """What is left of a pack that is to be closed is less than this, without spare bits."""
        capacity = (self.full & ~self.spare) >> self.shifts[0]
        return -(-capacity // _CLOSING) << self.shifts[0]

    def join(self, columns: Sequence[np.ndarray]) -> np.ndarray:
        """Return lengths and needs (N,) each as one int64 (N,)."""
        keys = np.zeros(len(columns[0]), dtype=np.int64)
        for column, shift in zip(columns, self.shifts, strict=True):
            keys += column.astype(np.int64) << shift
        return keys


class _Rows(NamedTuple):
    """Alike items as rows, shortest first; the items of a row have consecutive slots."""

    keys: list[int]
    counts: list[int]
    slots: list[int]
    """of the first item that is left"""

    def take(self, row: int) -> int:
        """Take an item of a row away, and the row with its last; return the item's slot."""
        keys, counts, slots = self
        slot = slots[row]
        if counts[row] == 1:
            del keys[row], counts[row], slots[row]
        else:
            counts[row] -= 1
            slots[row] = slot + 1
        return slot


def _rows(keys: np.ndarray, items: np.ndarray, first_slot: int = 0) -> tuple[_Rows, np.ndarray]:
    """Return items as rows, and the item in each slot."""
    items = items[np.argsort(keys[items], kind="stable")]
    keys = keys[items]
    first = np.flatnonzero(np.diff(keys, prepend=-1))
    counts = np.diff(first, append=len(keys)).tolist()
    return _Rows(keys[first].tolist(), counts, (first + first_slot).tolist()), items


def _fill(
    free: _Rows, bound: _Rows, drawn: list[int], fields: _Fields
) -> tuple[list[int], list[int]]:
    """Return the slots of all packs, one pack after another, and where each begins.

    `free` rows need nothing of any budget, `bound` ones do; items with the keys `drawn` come in
    this order, as long as such items are left.
    """
    slots: list[int] = []
    starts = [0]
    early: dict[int, int] = {}  # placed before they were drawn, by key
    spare, closing, needs = fields.spare, fields.closing, fields.mask_of_needs
    draws = iter(drawn)
    key = next(draws, 0)
    while free.keys or bound.keys:
        left = fields.full
        while key:
            if before := early.get(key):
                early[key] = before - 1
            elif (left - key) & spare == spare:
                rows = bound if key & needs else free
                slots.append(rows.take(bisect_left(rows.keys, key)))
                left -= key
            else:
                break
            key = next(draws, 0)
            if left - spare < closing:
                break
        most = _MOST_CLOSING if key and bound.keys else len(drawn) + fields.full
        while most and (found := _longest(free, bound, left, spare)):
            rows, row = found
            fit = rows.keys[row]
            slots.append(rows.take(row))
            left -= fit
            early[fit] = early.get(fit, 0) + 1
            most -= 1
        starts.append(len(slots))
    return slots, starts


def _longest(free: _Rows, bound: _Rows, left: int, spare: int) -> tuple[_Rows, int] | None:
    """Return a long row that fits into what is left, None if none is found.

    Of the bound rows the longest ones are tried, then ever shorter ones in growing steps: what
    needs less is mostly shorter.
    """
    row = bisect_right(free.keys, left - spare) - 1
    other = bisect_right(bound.keys, left - spare) - 1
    tries = 0
    while other >= 0 and (row < 0 or bound.keys[other] >= free.keys[row]):
        if (left - bound.keys[other]) & spare == spare:
            return bound, other
        tries += 1
        other -= 1 << tries // 8
    return (free, row) if row >= 0 else None
