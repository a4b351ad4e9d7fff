import numpy as np
import pytest

from triptych_data.lengths import Lengths
from triptych_data.order import epoch_order
from triptych_data.plan import Plan

FIRST = [7, 0, 8, 2, 3, 1, 6, 9, 4, 5]
SECOND = [5, 0, 7, 1, 3, 8, 9, 4, 2, 6]


def make_plan(num_samples=200, **options):
    rng = np.random.default_rng(0)
    tokens, patches = (rng.integers(1, 65, num_samples, dtype=np.int32) for _ in range(2))
    samples = np.arange(0, num_samples, options.pop("every", 1))
    settings = {"seed": 3, "seq_len": 128, **options}
    return Plan(samples, Lengths(tokens, tokens, patches), **settings)


def epoch_packs(plan, epoch):
    plan.pack(0)
    while len(plan.epoch_starts) < epoch + 2:
        plan.pack(plan.epoch_starts[-1])
    return [plan.pack(p) for p in range(*plan.epoch_starts[epoch : epoch + 2])]


@pytest.mark.parametrize("every", [1, 3])
def test_every_sample_once_per_epoch_in_another_order(every):
    plan = make_plan(every=every)
    epochs = [epoch_packs(plan, epoch) for epoch in range(3)]
    for packs in epochs:
        assert sorted(i for pack in packs for i in pack) == plan.samples.tolist()
    assert epochs[0] != epochs[1] != epochs[2]


def test_any_position_is_reached_at_once():
    in_turn = make_plan()
    packs = [in_turn.pack(p) for p in range(300)]
    for position in (299, 0, 150, 31, 298):
        fresh = make_plan()
        assert fresh.pack(position) == packs[position]
        assert in_turn.pack(position) == packs[position]


def test_known_epoch_starts_change_nothing():
    plan = make_plan()
    expected = plan.pack(300)
    resumed = make_plan()
    resumed.epoch_starts = [start for start in plan.epoch_starts if start <= 300]
    assert resumed.pack(300) == expected
    assert len(resumed._epochs) == 1  # no earlier epoch was packed


def test_epoch_of_a_position():
    plan = make_plan()
    epoch_packs(plan, 1)
    start = plan.epoch_starts[1]
    assert [plan.epoch(p) for p in (0, start - 1, start)] == [0, 0, 1]


def test_patch_budget_holds():
    plan = make_plan(max_patches=100)
    assert all(plan._lengths.num_patches[plan.pack(p)].sum() <= 100 for p in range(100))


def test_few_epochs_are_held():
    plan = make_plan()
    for position in range(500):
        plan.pack(position)
    assert len(plan._epochs) <= 2


@pytest.mark.parametrize("num_samples", [1, 2, 1000])
def test_order_is_a_permutation(num_samples):
    assert sorted(epoch_order(num_samples, 5, 7).tolist()) == list(range(num_samples))


def test_order_is_ours_to_keep():
    """These numbers may never change: saved positions would point at other samples."""
    assert epoch_order(10, 0, 0).tolist() == FIRST
    assert epoch_order(10, 2**63 - 1, 1).tolist() == SECOND


def test_orders_of_seeds_and_epochs_differ():
    orders = [epoch_order(50, seed, epoch).tolist() for seed in range(5) for epoch in range(5)]
    assert len({tuple(order) for order in orders}) == 25


def test_order_looks_uniform():
    first = np.array([epoch_order(8, seed, epoch)[0] for seed in range(60) for epoch in range(60)])
    counts = np.bincount(first, minlength=8)
    assert ((counts - 450) ** 2 / 450).sum() < 24.3  # chi-square, 7 degrees: p = 0.001
