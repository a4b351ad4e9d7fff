import time

import numpy as np
import pytest

from triptych_data.plan.packing import Budget, Packs, pack_lengths, split_packs


def bins(lengths, capacity, budgets=()):
    packs = pack_lengths(np.array(lengths, dtype=np.int32), capacity, budgets)
    return [packs[p].tolist() for p in range(len(packs))]


def reference(lengths, capacity):
    """The rule written as it is said, item by item."""
    drawn = list(range(int(len(lengths) * 7 / 8)))
    left = set(range(len(lengths)))
    packs = []
    while left:
        pack, room = [], capacity
        while drawn:
            if drawn[0] in left:
                if lengths[drawn[0]] > room:
                    break
                pack.append(drawn[0])
                left.remove(drawn[0])
                room -= lengths[drawn[0]]
            drawn.pop(0)
            if room < capacity / 4:
                break
        while fitting := [i for i in left if lengths[i] <= room]:
            longest = min(fitting, key=lambda i: (-lengths[i], i))
            pack.append(longest)
            left.remove(longest)
            room -= lengths[longest]
        packs.append(pack)
    return packs


def test_items_come_in_order_until_a_quarter_is_left():
    assert bins([4, 2, 2, 7, 1, 5, 5, 3, 2], 10) == [[0, 1, 2, 8], [3, 4], [5, 6], [7]]


def test_of_equal_lengths_the_first_comes_first():
    assert bins([4, 4, 4, 4, 2], 10) == [[0, 1, 4], [2, 3]]


def test_no_lengths_give_no_packs():
    assert bins([], 10) == []


@pytest.mark.parametrize("seed", range(20))
def test_equals_the_reference(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 30 if seed % 2 else 3000, 400)
    capacity = int(lengths.max() + rng.integers(0, 3000))
    assert bins(lengths, capacity) == reference(lengths.tolist(), capacity)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("num_budgets", [0, 1, 2])
def test_every_item_once_and_no_pack_too_long(seed, num_budgets):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 65, 1000)
    sizes = [rng.integers(0, 30, 1000) * (rng.random(1000) < 0.6) for _ in range(num_budgets)]
    budgets = [Budget(size, limit) for size, limit in zip(sizes, (40, 29), strict=False)]
    packs = pack_lengths(lengths, 64, budgets)
    assert sorted(packs.items.tolist()) == list(range(1000))
    assert all(0 < lengths[packs[p]].sum() <= 64 for p in range(len(packs)))
    for size, limit in budgets:
        assert max(size[packs[p]].sum() for p in range(len(packs))) <= limit


def test_a_budget_that_does_not_bind_changes_nothing():
    lengths = np.random.default_rng(0).integers(1, 65, 1000)
    assert bins(lengths, 64, [Budget(lengths, 65_000)]) == bins(lengths, 64)


def test_a_budget_that_binds_is_used_up():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(6, 1, 8192).astype(np.int32), 1, 8192)
    budget = Budget(np.minimum(rng.integers(0, 4 * lengths), 10_000), 10_000)
    packs = pack_lengths(lengths, 8192, [budget])
    assert budget.sizes.sum() / (len(packs) * budget.limit) > 0.97


def test_padding_is_small_and_packing_fast():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(6, 1, 8192).astype(np.int32), 1, 8192)
    seconds = []
    for _ in range(5):
        begin = time.process_time()
        packs = pack_lengths(lengths, 8192)
        seconds.append(time.process_time() - begin)
    assert 1 - lengths.sum() / (len(packs) * 8192) < 0.002
    assert len(lengths) / min(seconds) > 500_000  # 1.5 M/s on a quiet core


def test_short_documents_are_spread_over_the_packs():
    """Best-fit-decreasing alone leaves all of them to the last packs: a spread of 13."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(6, 1, 8192).astype(np.int32), 1, 8192)
    counts = np.diff(pack_lengths(lengths, 8192).starts)
    assert 12 < counts.mean() < 13
    assert counts.std() < 7


def test_the_largest_fields_of_the_configuration_fit():
    lengths = np.array([2**21, 1, 2**20])
    budgets = [Budget(np.array([0, 2**22, 2**22]), 2**22), Budget(np.array([2**14] * 3), 2**14)]
    assert sorted(bins(lengths, 2**21, budgets)) == [[0], [1], [2]]


def test_packs_are_split_to_a_multiple():
    packs = Packs(np.arange(13), np.array([0, 1, 6, 9, 13]))
    got = split_packs(packs, 6)
    assert [got[p].tolist() for p in range(len(got))] == [
        [0],
        [1, 2],
        [3, 4, 5],
        [6, 7, 8],
        [9, 10],
        [11, 12],
    ]
    assert split_packs(packs, 4) is not None and len(split_packs(packs, 4)) == 4
    assert len(split_packs(packs, 8)) == 4  # a pack of one item cannot be split
    assert len(split_packs(packs, 32)) == 4
