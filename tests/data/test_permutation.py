import itertools
import time
from collections import Counter

import numpy as np
import pytest

from triptych_data.plan.permutation import hashes, permute, stream_key

KEY = stream_key(7, "order of samples", "shards")
SIZES = [*range(1, 70), 127, 128, 129, 251, 1021, 4095, 4096, 4097, 10_007, 65_535, 65_536, 65_537]


@pytest.mark.parametrize("epoch", [0, 1, 12_345])
@pytest.mark.parametrize("size", SIZES)
def test_every_index_comes_out_once(size, epoch):
    assert np.array_equal(
        np.sort(permute(np.arange(size), size, KEY, epoch)), np.arange(size, dtype=np.int64)
    )


@pytest.mark.parametrize("size", [2**32 - 5, 2**40 + 7, 2**62 - 1])
def test_huge_sets_need_no_list(size):
    indices = np.concatenate([np.arange(1000), size - 1 - np.arange(1000)])
    images = permute(indices, size, KEY, 3)
    assert len(set(images.tolist())) == 2000
    assert images.min() >= 0 and images.max() < size
    assert 0.4 < images.mean() / size < 0.6


def test_these_numbers_may_never_change():
    """Saved positions would point at other samples."""
    assert KEY == 0xC421AFD45929A774
    assert permute(np.arange(10), 10, KEY).tolist() == [6, 7, 4, 8, 9, 1, 2, 0, 3, 5]
    assert permute(np.arange(10), 10, KEY, 1).tolist() == [2, 3, 0, 1, 7, 9, 4, 8, 6, 5]
    far = permute(np.array([0, 1, 10**12]), 10**12 + 39, KEY, 5)
    assert far.tolist() == [974618109040, 668289301961, 583404006120]
    assert hashes(2, KEY).tolist() == [0x1FA6C1AAB402DA17, 0x99F62E5749C64A3B]


def test_orders_of_seeds_sources_and_epochs_differ():
    orders = {
        tuple(permute(np.arange(50), 50, stream_key(seed, source), epoch).tolist())
        for seed, source, epoch in itertools.product(range(4), ("a", "b", "ab"), range(4))
    }
    assert len(orders) == 4 * 3 * 4


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_each_index_may_have_an_epoch_of_its_own(size):
    numbers = np.arange(4 * size)
    orders = [permute(np.arange(size), size, KEY, epoch) for epoch in range(4)]
    together = permute(numbers % size, size, KEY, numbers // size)
    assert np.array_equal(together, np.concatenate(orders))


def test_all_orders_of_few_are_equally_likely():
    orders = Counter(
        tuple(permute(np.arange(4), 4, stream_key(seed, "x")).tolist()) for seed in range(4800)
    )
    assert len(orders) == 24
    assert sum((n - 200) ** 2 / 200 for n in orders.values()) < 49.7  # 23 degrees: p = 0.001


def test_every_place_is_equally_likely():
    counts = np.zeros((8, 8))
    for seed in range(3600):
        counts[np.arange(8), permute(np.arange(8), 8, stream_key(seed, "y"))] += 1
    assert ((counts - 450) ** 2 / 450).sum() < 85.4  # 49 degrees: p = 0.001


def test_neighbours_are_torn_apart():
    order = permute(np.arange(100_003), 100_003, KEY)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.015  # 3 sigma: 0.0095
    assert abs(np.abs(np.diff(order)).mean() / 100_003 - 1 / 3) < 0.005


def test_two_million_indices_a_second():
    seconds = []
    for window in range(20):
        indices = np.arange(window * 8192, (window + 1) * 8192)
        begin = time.process_time()
        permute(indices, 10_000_019, KEY, 3)
        seconds.append(time.process_time() - begin)
    assert 8192 / np.median(seconds) > 2_000_000  # 26 M/s on a quiet core
