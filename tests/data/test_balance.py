from collections import Counter

import numpy as np
import pytest

from tools.bench_data_plan import balance, make_plan, reference_lengths
from triptych_data.plan.balance import Cost, balanced_order

COSTS = np.random.default_rng(0).lognormal(0, 1, 1000).astype(np.float64)


def test_cost_counts_every_document_and_image():
    cost = Cost(linear=24, vision=0.5, vision_linear=6, target=9, audio=11)
    tokens, images = np.array([100, 7], dtype=np.int32), [[40, 8], []]
    targets = np.array([30, 0], dtype=np.int32)
    patches = np.array([sum(row) for row in images], dtype=np.int32)
    pairs = np.array([sum(p * p for p in row) for row in images])
    heard = np.array([0, 250], dtype=np.int32)
    expected = [100 * 124 + 30 * 9 + (40 * 46 + 8 * 14) // 2, 7 * 31 + 250 * 11]
    assert cost.of_samples(tokens, patches, pairs, targets, heard).tolist() == expected


def test_costs_of_the_longest_documents_do_not_overflow():
    cost = Cost(linear=12 * 8192, vision=1000.0, vision_linear=0)
    tokens, pairs = np.array([2**21], dtype=np.int32), np.array([2**40])
    got = cost.of_samples(tokens, np.array([2**20], dtype=np.int32), pairs, tokens, 0 * tokens)
    assert got.tolist() == [2**21 * (2**21 + 12 * 8192) + 1000 * 2**40]


@pytest.mark.parametrize("group", [1, 2, 32, 1024])
@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 1000])
def test_every_pack_once(count, group):
    order = balanced_order(COSTS[:count], group, key=5)
    assert sorted(order.tolist()) == list(range(count))


@pytest.mark.parametrize("run", [2, 4, 8, 16, 32])
def test_aligned_runs_are_neighbours_by_cost(run):
    """But for those that are left over, and those astride the place they were taken from."""
    ranks = np.empty(1000, dtype=int)
    ranks[np.argsort(COSTS)] = np.arange(1000)
    order = ranks[balanced_order(COSTS, 32, key=9)][:992].reshape(-1, run)
    spread = order.max(axis=1) - order.min(axis=1)
    assert np.isin(spread, (run - 1, run - 1 + 1000 % 32)).all()
    assert (spread == run - 1).mean() > 0.9


def test_keys_give_other_orders_and_every_place_is_equally_likely():
    orders = [balanced_order(np.arange(64.0), 8, key) for key in range(3200)]
    first = Counter(order[0] for order in orders)
    assert len(first) == 64
    assert sum((n - 50) ** 2 / 50 for n in first.values()) < 103.4  # 63 degrees: p = 0.001


def test_left_over_packs_come_last_and_from_anywhere():
    ends = [balanced_order(np.arange(70.0), 32, key)[64:].tolist() for key in range(50)]
    assert {min(end) for end in ends} == {0, 32, 64}
    assert all(max(end) == min(end) + 5 for end in ends)
    assert all(max(end[:4]) - min(end[:4]) in (3, 5) for end in ends)  # in blocks of 4 and 2
    assert len({tuple(end) for end in ends}) > 10


def test_a_group_of_one_is_a_shuffle():
    order = balanced_order(np.arange(1000.0), 1, key=3)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.1


@pytest.mark.parametrize(("width", "at_random"), [(2048, 1.37), (4096, 1.22)])
def test_eight_ranks_are_balanced_on_long_documents(width, at_random):
    plan = make_plan(300_000, 32_768, share_long=0.05, linear=12 * width)
    packs = [pack for window in range(2) for pack in plan.window_packs(window)]
    costs = np.array([plan.costs(pack.samples).sum() for pack in packs], dtype=np.float64)
    assert balance(costs) < 1.01  # 1.06 is the goal
    assert balance(np.random.default_rng(0).permutation(costs)) == pytest.approx(
        at_random, abs=0.02
    )


def test_steps_that_begin_in_the_middle_of_blocks_are_balanced_too():
    """As after windows of any number of packs, or a resume on another number of ranks."""
    plan = make_plan(100_000, 32_768, share_long=0.05)
    costs = np.array([plan.costs(pack.samples).sum() for pack in plan.window_packs(0)], float)
    assert max(balance(costs[first:]) for first in range(1, 8)) < 1.06


def test_the_reference_mixture_is_that_of_the_measurements():
    lengths = reference_lengths(100_000)
    assert abs(lengths.num_tokens.mean() - 762) < 20
    assert abs(np.percentile(lengths.num_tokens, 99) - 2836) < 150
