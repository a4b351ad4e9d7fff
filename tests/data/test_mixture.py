import time

import numpy as np
import pytest

from triptych_data.plan.mixture import MixSource, Mixture


def mix(*sources, **options):
    named = [MixSource(f"s{i}", **source) for i, source in enumerate(sources)]
    return Mixture(named, **{"window": 100, **options})


def sized(*sizes):
    return [{"num_samples": size} for size in sizes]


def weighted(*sources, **options):
    """Sources as (size, weights, other settings)."""
    rows = []
    for size, weights, *others in sources:
        points = weights if isinstance(weights, list) else [(0, weights)]
        rows.append({"num_samples": size, "weights": points} | dict(*others))
    return mix(*rows, **options)


def given(mixture, position):
    """Samples of each source before a position, linear within a window."""
    window = mixture.window_at(position)
    begin = mixture.start(window)
    if begin == position:
        return np.array(mixture.counts(window), dtype=float)
    before, after = np.array(mixture.counts(window)), np.array(mixture.counts(window + 1))
    return before + (after - before) * (position - begin) / (after - before).sum()


MIXTURES = {
    "one": mix(*sized(250)),
    "three": mix(*sized(1000, 333, 7)),
    "tiny": mix(*sized(1)),
    "repeats": mix({"num_samples": 50, "repeat": 3}, {"num_samples": 400, "repeat": 0.5}),
    "capped": mix({"num_samples": 300, "epochs": 2}, {"num_samples": 450}, {"num_samples": 80}),
    "capped in an epoch": mix({"num_samples": 300, "epochs": 0.4}, {"num_samples": 450}),
    "weights": weighted((1000, 1.0), (50, 3.0), (700, 0.001)),
    "temperature": mix(*sized(100_000, 1000, 10), temperature=2.0),
    "schedule": weighted((1000, [(0, 1.0), (5000, 0.0)]), (500, [(2000, 0.5), (9000, 4.0)])),
    "all": weighted((1000, 1.0, {"epochs": 2}), (50, [(300, 0.0), (1000, 3.0)]), (70, 1.0)),
    "ending": weighted((1000, 1.0, {"epochs": 2}), (50, 3.0, {"epochs": 1.5})),
}


@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES.keys())
def test_counts_never_decrease_and_windows_are_of_their_size(mixture):
    last = 400 if mixture.num_windows is None else mixture.num_windows
    counts = np.array([mixture.counts(window) for window in range(last + 1)])
    assert (counts[0] == 0).all()
    steps = np.diff(counts, axis=0)
    assert (steps >= 0).all()
    if mixture.start(mixture.num_windows or 1) >= 100:
        assert (steps.sum(axis=1) <= 150 + len(mixture.sources)).all()


@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES.keys())
def test_a_position_is_in_the_window_that_begins_last_before_it(mixture):
    last = 50 if mixture.num_windows is None else mixture.num_windows
    starts = [mixture.start(window) for window in range(last + 1)]
    for position in range(starts[-1]):
        window = mixture.window_at(position)
        assert starts[window] <= position < starts[window + 1]


def test_every_sample_once_an_epoch_and_epochs_end_with_windows():
    mixture = MIXTURES["three"]
    ends = [w for w in range(60) if mixture.start(w) % 1340 == 0]
    assert ends == [0, 13, 26, 39, 52]
    assert mixture.counts(26) == [2000, 666, 14]
    assert [mixture.epoch(p) for p in (0, 1339, 1340, 2680 * 10**9)] == [0, 0, 1, 2 * 10**9]


def test_windows_of_an_epoch_are_alike():
    mixture = mix(*sized(1049))
    assert set(np.diff([mixture.start(w) for w in range(11)]).tolist()) == {104, 105}
    assert mixture.start(10) == 1049


def test_repeats_count_within_the_epoch():
    mixture = MIXTURES["repeats"]
    end = mixture.window_at(350)
    assert mixture.start(end) == 350 and mixture.counts(end) == [150, 200]
    assert mixture.counts(2 * end) == [300, 400]


def test_an_exhausted_source_leaves_shorter_epochs():
    mixture = MIXTURES["capped"]
    ends = [
        w
        for w in range(60)
        if mixture.epoch(mixture.start(w)) != mixture.epoch(mixture.start(w + 1))
    ]
    counts = [mixture.counts(w + 1) for w in ends]
    assert counts[:4] == [[300, 450, 80], [600, 900, 160], [600, 1350, 240], [600, 1800, 320]]


def test_an_epoch_may_be_cut_short_by_an_exhausted_source():
    mixture = MIXTURES["capped in an epoch"]
    assert mixture.counts(mixture.window_at(300))[:2] == [120, 180]
    assert mixture.counts(mixture.window_at(750)) == [120, 630]
    assert [mixture.epoch(p) for p in (0, 299, 300, 749, 750)] == [0, 0, 1, 1, 2]


def test_weights_are_shares_at_any_depth():
    mixture = weighted((1000, 1.0), (50, 3.0))
    for window in (4, 10**6, 10**9):
        assert mixture.counts(window) == [25 * window, 75 * window]


def test_temperature_flattens_sizes():
    mixture = MIXTURES["temperature"]
    roots = np.sqrt([100_000, 1000, 10])
    assert np.allclose(mixture.counts(10**6), 1e8 * roots / roots.sum(), atol=1)
    steady = mix(*sized(300, 100), temperature=1.0)
    assert np.allclose(steady.counts(10**4), [750_000, 250_000], atol=1)


def test_shares_change_linearly():
    mixture = weighted((10**9, [(0, 1.0), (1000, 0.0)]), (10**9, [(0, 0.0), (1000, 1.0)]))
    for position in (100, 500, 1000):
        first = position - position**2 / 2000
        assert np.allclose(given(mixture, position), [first, position - first], atol=1)
    assert np.allclose(given(mixture, 5000), [500, 4500], atol=1)


def test_weights_hold_still_outside_their_points():
    mixture = weighted((10**9, [(1000, 3.0), (2000, 1.0)]), (10**9, 1.0))
    assert np.allclose(given(mixture, 1000), [750, 250], atol=1)
    assert np.allclose(given(mixture, 2000) - given(mixture, 1000), [625, 375], atol=1)
    assert np.allclose(given(mixture, 9000) - given(mixture, 2000), [3500, 3500], atol=1)


def test_an_exhausted_source_leaves_its_share_in_proportion():
    mixture = weighted((100, 5.0, {"epochs": 2}), (10**6, 3.0), (10**6, 1.0))
    assert np.allclose(given(mixture, 360), [200, 120, 40], atol=1)
    assert np.allclose(given(mixture, 4360), [200, 3120, 1040], atol=1)
    assert mixture.counts(10**7)[0] == 200


def test_an_exhausted_source_in_the_middle_of_a_change():
    mixture = weighted((100, [(0, 1.0), (1000, 0.0)], {"epochs": 1}), (10**6, 1.0), (10**6, 1.0))
    at = mixture.window_at(368)  # 1000 - sqrt(400_000): x/3 - x²/6000 = 100
    after = [mixture.counts(w) for w in range(at, at + 40)]
    assert mixture.start(at) == 368 and all(counts[0] == 100 for counts in after)
    assert all(abs(counts[1] - counts[2]) <= 1 for counts in after)


def test_what_is_left_of_a_change_goes_on_from_where_it_was():
    falling, steady = [(0, 1.0), (1000, 0.0)], 1.0
    mixture = weighted((100, steady, {"epochs": 2}), (10**6, falling), (10**6, steady))
    at = mixture.start(next(w for w in range(99) if mixture.counts(w)[0] == 200))
    assert 400 < at < 600
    weight = 1 - at / 1000  # of the falling one, beside 1.0: linear to zero, as shares are
    gained = given(mixture, 1000) - given(mixture, at)
    assert np.allclose(gained[1], (1000 - at) * weight / (1 + weight) / 2, atol=1)


def test_the_run_ends_when_all_are_exhausted():
    mixture = MIXTURES["ending"]
    assert mixture.counts(mixture.num_windows) == [2000, 75]
    assert mixture.window_at(2075) == mixture.window_at(10**12) == mixture.num_windows


def test_the_run_ends_when_only_weights_of_zero_are_left():
    mixture = weighted((100, 1.0, {"epochs": 1}), (100, 0.0))
    assert mixture.counts(mixture.num_windows) == [100, 0]


def test_no_weight_at_all_is_refused():
    with pytest.raises(ValueError, match=r"data\.sources: at least one must have a positive"):
        weighted((100, 0.0), (100, 0.0))


def test_a_source_may_come_in_late():
    mixture = weighted((100, 1.0), (100, [(1000, 0.0), (1001, 1.0)]))
    assert np.allclose(given(mixture, 1000), [1000, 0], atol=1)
    assert np.allclose(given(mixture, 3000), [2000, 1000], atol=2)


def test_weights_in_tokens():
    long, short = {"mean_tokens": 1000.0}, {"mean_tokens": 100.0}
    mixture = weighted((10**6, 1.0, long), (10**6, 1.0, short), in_tokens=True)
    assert np.allclose(given(mixture, 11_000), [1000, 10_000], atol=1)
    changing = weighted(
        (10**6, [(0, 1.0), (10**6, 0.0)], long), (10**6, 1.0, short), in_tokens=True
    )
    end = changing._pieces[1].first_window
    assert np.array([1000, 100]) @ changing.counts(end) == pytest.approx(10**6, rel=0.001)
    assert np.allclose(np.diff([changing.counts(w) for w in (end, end + 99)], axis=0), [0, 9900])


def test_any_depth_is_reached_at_once():
    mixture = weighted(*[(1000 + i, [(0, 1.0), (10**6 * i + 1, float(i))]) for i in range(20)])
    seconds = []
    for position in (0, 10**7, 10**12):
        begin = time.process_time()
        window = mixture.window_at(position)
        assert mixture.start(window) <= position < mixture.start(window + 1)
        seconds.append(time.process_time() - begin)
    assert max(seconds) < 0.1


def test_floats_do_not_decide():
    """A last bit of difference in a power, as between machines, must not move a count."""
    once = weighted((100, 0.1), (100, 0.2), (100, 0.7))
    again = weighted((100, np.nextafter(0.1, 1)), (100, 0.2), (100, np.nextafter(0.7, 0)))
    assert once.counts(10**9) == again.counts(10**9)


@pytest.mark.parametrize("seed", range(60))
def test_any_mixture_keeps_its_promises(seed):
    rng = np.random.default_rng(seed)
    has_weights = rng.random() < 0.7
    sources = []
    for _ in range(rng.integers(1, 6)):
        source = {"num_samples": int(rng.integers(1, 2000))}
        if has_weights:
            points = sorted(set(rng.integers(0, 9000, rng.integers(1, 5)).tolist()))
            source["weights"] = [(at, float(rng.choice([0, 1, rng.random()]))) for at in points]
        else:
            source["repeat"] = float(rng.choice([0.3, 1, 2.5]))
        if rng.random() < 0.5:
            source["epochs"] = float(rng.choice([0.01, 0.5, 1, 3]))
        sources.append(source | {"mean_tokens": float(rng.integers(1, 2000))})
    in_tokens = bool(has_weights and rng.random() < 0.3)
    try:
        mixture = mix(*sources, window=int(rng.integers(64, 3000)), in_tokens=in_tokens)
    except ValueError:
        first = [source["weights"][0][1] for source in sources]
        assert not any(first)
        return
    last = 300 if mixture.num_windows is None else mixture.num_windows
    counts = np.array([mixture.counts(window) for window in range(last + 1)])
    assert (np.diff(counts, axis=0) >= 0).all()
    for given_last, source in zip(counts[-1], sources, strict=True):
        if "epochs" in source:
            assert given_last <= max(1, round(source["epochs"] * source["num_samples"]))
    for position in rng.integers(0, max(1, mixture.start(last)), 20).tolist():
        window = mixture.window_at(position)
        assert mixture.start(window) <= position < mixture.start(window + 1)
        assert mixture.epoch(position) >= 0
