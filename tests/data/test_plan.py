import json
import time
from itertools import chain, islice, pairwise, takewhile

import numpy as np
import pytest

from tools.bench_data_plan import make_plan as make_reference_plan
from triptych_data.config import DataConfig
from triptych_data.plan.lengths import Lengths
from triptych_data.plan.plan import Plan, PlanSource

SIZES = [(200,), (100, 30, 77), (1,), (64,), (65, 1)]


def make_lengths(count):
    rng = np.random.default_rng(0)
    tokens, patches = (rng.integers(1, 65, count, dtype=np.int32) for _ in range(2))
    pairs = patches.astype(np.int64) ** 2
    return Lengths(tokens, tokens, patches, patches // 20, pairs, 0 * tokens)


def make_plan(sizes=(200,), sources=(), lengths=None, **settings):
    """Sources s0, s1, … of these sizes, with these settings each."""
    sources = {f"s{i}": {"shards": ["x"]} for i in range(len(sizes))} | {
        f"s{i}": {"shards": ["x"], **source} for i, source in enumerate(sources)
    }
    config = DataConfig(**{"sources": sources, "seq_len": 128, "window": 64, "seed": 3} | settings)
    planned = [PlanSource(name, size, "f") for name, size in zip(sources, sizes, strict=True)]
    return Plan(config, planned, lengths or make_lengths(sum(sizes)), "p")


def listed(packs):
    return [(pack.position, pack.next_position, pack.samples.tolist()) for pack in packs]


def up_to(plan, position):
    return list(takewhile(lambda pack: pack.position < position, plan.packs()))


def samples_of(packs):
    return list(chain(*(pack.samples.tolist() for pack in packs)))


@pytest.mark.parametrize("sizes", SIZES)
def test_every_sample_once_per_epoch_in_another_order(sizes):
    total, plan = sum(sizes), make_plan(sizes)
    packs = up_to(plan, 3 * total)
    epochs = [samples_of(p for p in packs if plan.epoch(p.position) == e) for e in range(3)]
    for samples in epochs:
        assert sorted(samples) == list(range(total))
    if total > 1:
        assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("sizes", SIZES)
def test_positions_count_samples(sizes):
    packs = list(islice(make_plan(sizes).packs(), 300))
    assert packs[0].position == 0
    assert all(one.next_position == other.position for one, other in pairwise(packs))
    assert all(p.next_position - p.position == len(p.samples) > 0 for p in packs)


WEIGHTED = {
    "sizes": (100, 30, 77),
    "sources": [{"weight": 1}, {"weight": [[0, 1], [900, 5]], "epochs": 3.5}, {"weight": 2}],
}


@pytest.mark.parametrize("options", [*({"sizes": sizes} for sizes in SIZES), WEIGHTED])
def test_any_position_is_reached_at_once(options):
    packs = listed(islice(make_plan(**options).packs(), 400))
    for number in (390, 0, 150, 31, 389):
        fresh = make_plan(**options)
        assert listed(islice(fresh.packs(packs[number][0]), 3)) == packs[number : number + 3]


def test_a_position_inside_a_pack_is_refused_and_the_next_one_found():
    plan = make_plan()
    first, second = islice(plan.packs(), 2)
    assert first.next_position > 1
    with pytest.raises(ValueError, match="position must be where a pack begins, got 1"):
        next(plan.packs(1))
    assert plan.next_begin(0) == 0
    assert plan.next_begin(1) == second.position
    for position in range(500):
        begin = plan.next_begin(position)
        assert begin >= position and next(plan.packs(begin)).position == begin


def test_weighted_sources_give_their_shares_and_each_sample_once_a_pass():
    plan = make_plan((100, 30), [{"weight": 1}, {"weight": 1}])
    samples = samples_of(up_to(plan, 6400))
    first = [sample for sample in samples if sample < 100]
    assert abs(len(first) - 3200) <= 1
    counts = np.bincount(samples, minlength=130)
    assert counts[:100].max() - counts[:100].min() <= 1
    assert counts[100:].max() - counts[100:].min() <= 1


def test_adding_a_source_keeps_the_order_of_the_others():
    """So that a mixture can grow without other samples coming up again."""
    alone = make_plan((50,), [{"weight": 1}])
    mixed = make_plan((50, 50), [{"weight": 1}, {"weight": 1}])
    assert alone._draw(0, 0, 120).tolist() == mixed._draw(0, 0, 120).tolist()


def test_equal_lengths_of_different_sources_share_packs():
    lengths = Lengths(*(np.full(2000, 16, dtype=np.int32) for _ in range(6)))
    plan = make_plan((1000, 1000), lengths=lengths, window=2000)
    share = [(pack.samples < 1000).mean() for pack in plan.window_packs(0)]
    assert np.std(share) < 0.25  # of 8 at random: 0.177


def test_samples_that_no_pack_holds_are_left_out_but_count():
    lengths = make_lengths(200)
    lengths.num_tokens[[3, 50, 51]] = 129  # too long
    lengths.num_tokens[[7, 99]] = 0  # refused by the processor
    lengths.num_patches[20], lengths.num_images[21] = 301, 11
    plan = make_plan(lengths=lengths, max_patches=300, max_images=10)
    packs = up_to(plan, 200)
    assert sorted(samples_of(packs)) == sorted({*range(200)} - {3, 7, 20, 21, 50, 51, 99})
    assert all(one.next_position == other.position for one, other in pairwise(packs))
    assert packs[-1].next_position == 200
    again = make_plan(lengths=lengths, max_patches=300, max_images=10)
    positions = [pack.position for pack in packs]
    assert [next(again.packs(position)).position for position in positions] == positions


def test_a_window_without_any_fitting_sample_is_passed_over():
    lengths = make_lengths(640)
    plan = make_plan((640,), lengths=lengths)
    lengths.num_tokens[plan._drawn(1)] = 0
    begin, end = plan.mixture.start(1), plan.mixture.start(2)
    assert next(plan.packs(begin)).position == end
    assert plan.next_begin(begin + 1) == end
    assert len(samples_of(up_to(plan, 640))) == 640 - (end - begin)


def test_budgets_hold():
    plan = make_plan((1000,), max_patches=100, max_images=3)
    packs = up_to(plan, 1000)
    assert sorted(samples_of(packs)) == list(range(1000))
    assert max(plan.lengths.num_patches[pack.samples].sum() for pack in packs) <= 100
    assert max(plan.lengths.num_images[pack.samples].sum() for pack in packs) <= 3
    assert max(plan.lengths.num_tokens[pack.samples].sum() for pack in packs) <= 128


def test_exhausted_sources_end_the_stream_with_an_error():
    plan = make_plan((100, 30), [{"epochs": 2}, {"epochs": 1}])
    packs = plan.packs()
    with pytest.raises(ValueError, match="all of them exhausted after 230 samples"):
        for _ in range(1000):
            next(packs)
    with pytest.raises(ValueError, match="exhausted after 230 samples"):
        next(plan.packs(10**6))


CHANGES = {
    "data.seed": {"seed": 4},
    "data.seq_len": {"seq_len": 130},
    "data.window": {"window": 200},
    "data.max_patches": {"max_patches": 70},
    "data.max_images": {"max_images": 5},
    "data.balance_group": {"balance_group": 4},
    "data.cost": {"cost": {"linear": 7}},
    "data.temperature": {"temperature": 3.0},
    "data.sources.s1": {"sources": [{}, {"repeat": 2}]},
}


@pytest.mark.parametrize(("name", "change"), CHANGES.items())
def test_the_fingerprint_names_what_changed_the_stream(name, change):
    one, other = make_plan((100, 50)), make_plan((100, 50), **change)
    was, now = one.fingerprint(), other.fingerprint()
    assert [key for key in was if was[key] != now[key]] == [name]
    assert listed(islice(one.packs(), 150)) != listed(islice(other.packs(), 150))


def test_the_fingerprint_names_data_processor_and_sources():
    plan = make_plan((100, 50))
    was = plan.fingerprint()
    assert was == json.loads(json.dumps(was)) == make_plan((100, 50)).fingerprint()
    sources = [PlanSource("s0", 100, "f"), PlanSource("s1", 50, "changed")]
    now = Plan(plan.config, sources, plan.lengths, "other").fingerprint()
    assert {key for key in was if was[key] != now[key]} == {"data of source s1", "processor"}
    more = make_plan((100, 50, 1)).fingerprint()
    assert {"sources", "data of source s2"} <= {k for k in more if more[k] != was.get(k)}


def test_what_only_the_loader_needs_is_no_part_of_the_stream():
    changed = make_plan(num_workers=7, prefetch=9, long_samples="skip", ledger=True)
    assert changed.fingerprint() == make_plan().fingerprint()


def test_this_stream_may_never_change():
    """If it has to, raise PLAN_VERSION: saved positions would point at other packs."""
    packs = make_plan((5, 3)).packs()
    first = [pack.samples.tolist() for pack in islice(packs, 4)]
    assert first == [[2, 5, 6, 0, 4, 7], [1, 3], [1, 6, 5], [0, 4, 2, 3, 7]]
    weighted = [{"weight": 1}, {"weight": [[0, 1], [5000, 3]]}]
    far = make_plan((900, 77), weighted, max_patches=100).window_packs(10**6)
    third = [962, 914, 922, 923]
    assert [pack.samples.tolist() for pack in far[:3]] == [[417, 965, 952], [921, 901, 961], third]


def test_windows_grow_with_the_length_of_packs_but_not_beyond_passes():
    assert make_reference_plan(20_000, 512).window == 8192
    assert make_reference_plan(20_000, 8192).window == 2**16
    assert make_reference_plan(20_000, 2**20).window == 2**17
    assert make_reference_plan(20_000, 8192, num_sources=2).window == 8192
    assert make_reference_plan(200_000, 8192, num_sources=2).window == 16_384


def test_windows_hold_whole_steps_of_eight_ranks_where_that_costs_little():
    plan = make_reference_plan(150_000, 8192)
    assert [len(plan.window_packs(window)) % 8 for window in range(4)] == [0] * 4
    assert sorted(samples_of(up_to(plan, 150_000))) == list(range(150_000))
    few = make_plan((1000,))
    tokens = few.lengths.num_tokens.sum()
    assert len(up_to(few, 1000)) < 1.1 * tokens / 128


@pytest.mark.parametrize("options", [{}, {"num_sources": 10}, {"max_patches": 24_000}])
def test_planning_is_fast_and_packs_are_full(options):
    plan = make_reference_plan(130_000, 8192, **options)
    rates, num_packs, tokens = [], 0, 0
    for window in range(2):
        begin = time.process_time()
        packs = plan.window_packs(window)
        rates.append(len(samples_of(packs)) / (time.process_time() - begin))
        num_packs += len(packs)
        tokens += plan.lengths.num_tokens[samples_of(packs)].sum()
    assert max(rates) > 250_000  # 0.6 to 1.2 M/s on a quiet core
    assert 1 - tokens / (num_packs * 8192) < 0.002


@pytest.mark.parametrize("depth", [10**7, 10**9, 10**12])
def test_a_far_position_costs_what_the_first_one_costs(depth):
    plan = make_reference_plan(200_000, 8192, num_sources=10)
    position = plan.mixture.start(plan.mixture.window_at(depth))
    seconds = {0: [], position: []}
    for _ in range(5):
        for start, times in seconds.items():
            begin = time.process_time()
            assert next(plan.packs(start)).position == start
            times.append(time.process_time() - begin)
    assert min(seconds[position]) < 2 * min(seconds[0]) + 0.005
