import time

import numpy as np
import pytest

from triptych_data.packing import pack_lengths


def bins(lengths, capacity, **options):
    packs = pack_lengths(np.array(lengths, dtype=np.int32), capacity, **options)
    return [packs[p].tolist() for p in range(len(packs))]


def reference(lengths, capacity, open_bins, patches=None, max_patches=None):
    """Best fit written as it is said; of equally full packs the one that became so first."""
    closed, opened = [], []
    patches = patches if patches is not None else [0] * len(lengths)
    bound = max_patches if max_patches is not None else 1
    for item, (length, size) in enumerate(zip(lengths, patches, strict=True)):
        fitting = [b for b in opened if b["room"] >= length and b["patches"] >= size]
        if fitting:
            best = min(fitting, key=lambda b: b["room"])
        else:
            if len(opened) == open_bins:
                fullest = min(opened, key=lambda b: b["room"])
                opened.remove(fullest)
                closed.append(fullest["items"])
            best = {"room": capacity, "patches": bound, "items": []}
            opened.append(best)
        best["room"] -= length
        best["patches"] -= size
        best["items"].append(item)
        if not best["room"]:
            opened.remove(best)
            closed.append(best["items"])
    return closed + [b["items"] for b in sorted(opened, key=lambda b: b["room"])]


def test_fullest_fitting_bin_is_chosen():
    assert bins([5, 7, 3, 2], 10) == [[1, 2], [0, 3]]


def test_full_bin_closes_at_once():
    assert bins([4, 10, 6, 1], 10) == [[1], [0, 2], [3]]


def test_fullest_bin_makes_room():
    assert bins([6, 7, 8, 1], 10, open_bins=2) == [[1], [2, 3], [0]]


def test_no_lengths_give_no_packs():
    assert bins([], 10) == []


@pytest.mark.parametrize("seed", range(20))
def test_equals_the_reference_where_no_bins_tie(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 100_000, 300)  # so long that no two bins are equally full
    capacity = int(lengths.max() + rng.integers(0, 100_000))
    assert bins(lengths, capacity, open_bins=4) == reference(lengths.tolist(), capacity, 4)
    patches = rng.integers(0, 50, 300)
    got = bins(lengths, capacity, open_bins=4, patches=patches, max_patches=60)
    assert got == reference(lengths.tolist(), capacity, 4, patches.tolist(), 60)


@pytest.mark.parametrize("max_patches", [None, 40])
@pytest.mark.parametrize("seed", range(10))
def test_every_item_once_and_no_pack_too_long(seed, max_patches):
    rng = np.random.default_rng(seed)
    lengths, patches = rng.integers(1, 65, 1000), rng.integers(0, 30, 1000)
    packs = pack_lengths(lengths, 64, open_bins=8, patches=patches, max_patches=max_patches)
    assert sorted(packs.items.tolist()) == list(range(1000))
    assert all(0 < lengths[packs[p]].sum() <= 64 for p in range(len(packs)))
    assert all((np.diff(packs[p]) > 0).all() for p in range(len(packs)))
    if max_patches is not None:
        assert all(patches[packs[p]].sum() <= max_patches for p in range(len(packs)))


def test_padding_is_small_and_packing_fast():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(6, 1, 50_000).astype(np.int32), 1, 8192)
    begin = time.process_time()
    packs = pack_lengths(lengths, 8192)
    seconds = time.process_time() - begin
    assert 1 - lengths.sum() / (len(packs) * 8192) < 0.005
    assert len(lengths) / seconds > 100_000  # 1.3 M/s on a quiet core
