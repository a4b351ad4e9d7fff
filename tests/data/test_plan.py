from itertools import islice, takewhile

import numpy as np
import pytest

from triptych_data.config import DataConfig
from triptych_data.lengths import Lengths
from triptych_data.plan import Plan, PlanSource


def make_plan(sizes=(200,), **options):
    rng = np.random.default_rng(0)
    tokens, patches = (rng.integers(1, 65, sum(sizes), dtype=np.int32) for _ in range(2))
    names = options.pop("sources", {"shards": None} if len(sizes) == 1 else {})
    names = {name: {"shards": [name]} | (source or {}) for name, source in names.items()}
    names = names or {f"s{i}": {"shards": [f"s{i}"]} for i in range(len(sizes))}
    config = DataConfig(**{"sources": names, "seq_len": 128, "window": 64, "seed": 3, **options})
    sources = [PlanSource(name, size, "f") for name, size in zip(names, sizes, strict=True)]
    images = patches // 20
    lengths = Lengths(tokens, tokens, patches, images, patches.astype(np.int64) ** 2)
    return Plan(config, sources, lengths)


def listed(packs):
    return [(pack.position, pack.next_position, pack.samples.tolist()) for pack in packs]


@pytest.mark.parametrize("sizes", [(200,), (100, 30, 77), (1,), (64,), (65, 1)])
def test_every_sample_once_per_epoch_in_another_order(sizes):
    total = sum(sizes)
    packs = list(takewhile(lambda pack: pack.position < 3 * total, make_plan(sizes).packs(0)))
    epochs = [
        np.concatenate([p.samples for p in packs if p.position // total == epoch])
        for epoch in range(3)
    ]
    for samples in epochs:
        assert sorted(samples.tolist()) == list(range(total))
    if total > 1:
        assert epochs[0].tolist() != epochs[1].tolist() != epochs[2].tolist()


@pytest.mark.parametrize("sizes", [(200,), (100, 30, 77)])
def test_any_position_is_reached_at_once(sizes):
    packs = listed(islice(make_plan(sizes).packs(0), 400))
    for number in (390, 0, 150, 31, 389):
        fresh = make_plan(sizes)
        assert listed(islice(fresh.packs(packs[number][0]), 3)) == packs[number : number + 3]


def test_a_position_inside_a_pack_is_refused():
    plan = make_plan()
    first = next(plan.packs(0))
    assert first.next_position > 1
    with pytest.raises(ValueError, match="position must be where a pack begins, got 1"):
        next(plan.packs(1))
