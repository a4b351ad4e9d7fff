import json
from itertools import chain, islice

import pytest
import torch

from tests.data.packs import MODEL, tiny_config, tiny_processor, write_mixture
from triptych_data.loader import PackLoader, eval_batches
from triptych_data.processor import Processor
from triptych_data.shards.reader import Shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_mixture(tmp_path_factory.mktemp("mixture"))


def open_loader(shards, rank=0, world_size=1, **settings):
    if "sources" in settings:
        shards = None
    config = tiny_config(shards, **settings)
    return PackLoader(config, tiny_processor(), rank=rank, world_size=world_size)


def take(loader, count):
    return [batch["sample_keys"] for batch in islice(loader, count)]


def stream(shards, world_size, steps, position=0, **settings):
    """What all ranks together see: the packs of each step, in the order of ranks."""
    ranks = []
    for rank in range(world_size):
        loader = open_loader(shards, rank, world_size, **settings)
        loader.position = position
        ranks.append(take(loader, steps))
    return [packs for step in zip(*ranks, strict=True) for packs in step]


@pytest.fixture(scope="module")
def two_epochs(shards):
    """All packs of two epochs, and how many of them are the first epoch's."""
    packs, epochs = [], []
    for batch in open_loader(shards):
        if batch["place"].epoch == 2:
            return packs, epochs.count(0)
        packs.append(batch["sample_keys"])
        epochs.append(batch["place"].epoch)
    return None


def position_of(packs, number):
    return sum(map(len, packs[:number]))


def test_every_sample_once_per_epoch(shards, two_epochs):
    packs, second = two_epochs
    keys = sorted(sample.key for sample in Shards.open(shards))
    assert sorted(chain(*packs[:second])) == sorted(chain(*packs[second:])) == keys
    assert packs[:second] != packs[second:]


@pytest.mark.parametrize(
    ("world_size", "num_workers"), [(1, 2), (2, 0), (2, 1), (4, 0)], ids=lambda v: str(v)
)
def test_stream_does_not_depend_on_ranks_or_workers(shards, two_epochs, world_size, num_workers):
    packs, _ = two_epochs
    steps = len(packs) // world_size
    got = stream(shards, world_size, steps, num_workers=num_workers)
    assert got == packs[: steps * world_size]


@pytest.mark.parametrize("number", [0, 1, 3, 10])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_resume_anywhere_on_another_world_size(shards, two_epochs, world_size, number):
    packs, _ = two_epochs
    steps = (len(packs) - number) // world_size
    got = stream(shards, world_size, steps, position_of(packs, number))
    assert got == packs[number : number + steps * world_size]


def test_batches_are_equal_with_and_without_workers(shards):
    inline, workers = open_loader(shards), open_loader(shards, num_workers=2)
    for one, other in zip(islice(inline, 4), workers, strict=False):
        assert one.keys() == other.keys()
        for name, value in one.items():
            same = torch.equal(value, other[name]) if torch.is_tensor(value) else None
            assert same if same is not None else value == other[name]


def test_packs_fill_the_row_and_never_overflow(shards):
    for batch in islice(open_loader(shards), 10):
        assert batch["input_ids"].shape == (1, 512)
        assert batch["cu_seqlens"][-1] == 512
        assert batch["num_targets"] > 0


def test_batches_know_their_place(shards, two_epochs):
    packs, second = two_epochs
    loader = open_loader(shards, rank=1, world_size=3)
    for step, batch in enumerate(islice(loader, 5)):
        number = 3 * step + 1
        assert batch["place"].position == position_of(packs, number)
        assert batch["place"].next_position == position_of(packs, 3 * step + 3)
        assert batch["place"].epoch == int(number >= second)
        assert batch["holes"] == []


def test_state_counts_what_was_yielded(shards, two_epochs):
    packs, _ = two_epochs
    loader = open_loader(shards, rank=1, world_size=2, num_workers=1, prefetch=4)
    batches = iter(loader)
    assert loader.state_dict()["position"] == 0
    for step in range(3):
        assert next(batches)["sample_keys"] == packs[2 * step + 1]
        assert loader.state_dict()["position"] == position_of(packs, 2 * (step + 1))
    resumed = open_loader(shards)
    resumed.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    assert take(resumed, 4) == packs[6:10]
    assert resumed.position == position_of(packs, 10)


def test_position_may_be_set_while_iterating(shards, two_epochs):
    packs, _ = two_epochs
    loader = open_loader(shards)
    batches = iter(loader)
    next(batches)
    loader.position = position_of(packs, 7)
    assert next(batches)["sample_keys"] == packs[7]
    assert loader.position == position_of(packs, 8)


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("data.seed", {"seed": 1}),
        ("data.seq_len", {"seq_len": 640}),
        ("data.max_patches", {"max_patches": 5000}),
        ("data.window", {"window": 64}),
        ("data.temperature", {"temperature": 2.0}),
        ("data.sources.shards", {"sources": {"shards": {"weight": 1}}}),
    ],
)
def test_state_of_another_plan_is_refused(shards, name, changed):
    state = open_loader(shards).state_dict()
    for source in changed.get("sources", {}).values():
        source["shards"] = shards
    with pytest.raises(ValueError, match=f"checkpoint data state: {name} must be"):
        open_loader(shards, **changed).load_state_dict(state)


def test_state_of_other_data_or_processor_is_refused(shards, tmp_path):
    state = open_loader(shards).state_dict()
    with pytest.raises(ValueError, match="data state: data of source shards must be"):
        open_loader(write_mixture(tmp_path, 10)).load_state_dict(state)
    small = Processor.from_directory(MODEL, max_pixels=1024)
    loader = PackLoader(tiny_config(shards), small, rank=0, world_size=1)
    with pytest.raises(ValueError, match=r"data state: .*processor\.image must be"):
        loader.load_state_dict(state)
    with pytest.raises(ValueError, match=r"data\.balance_group must be None"):
        open_loader(shards).load_state_dict({"position": 3})


def test_going_on_anyway_is_recorded_for_good(shards, tmp_path):
    state = open_loader(shards).state_dict() | {"position": 0}
    other = write_mixture(tmp_path, 10)
    loader = open_loader(other, resume_anyway=True, seed=3)
    loader.load_state_dict(state)
    take(loader, 1)
    (record,) = loader.state_dict()["resumed_anyway"]
    assert record["position"] == 0
    assert record["changed"]["data.seed"] == {"was": 0, "is": 3}
    assert set(record["changed"]) == {"data.seed", "data of source shards"}
    again = open_loader(other, seed=3)
    again.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    assert again.state_dict() == loader.state_dict()


@pytest.mark.parametrize("position", [13, 97, 200])
def test_going_on_with_other_packs_begins_with_the_next_one(shards, position):
    before = open_loader(shards)
    stream = iter(before)
    while before.position < position:
        next(stream)
    after = open_loader(shards, seq_len=900, resume_anyway=True)
    after.load_state_dict(before.state_dict())
    begins = [batch["place"].position for batch in islice(open_loader(shards, seq_len=900), 100)]
    place = next(iter(after))["place"]
    assert place.position == min(begin for begin in begins if begin >= before.position)


def test_seed_gives_another_order(shards):
    assert take(open_loader(shards), 5) != take(open_loader(shards, seed=1), 5)


def test_iterating_leaves_the_global_random_stream_alone(shards):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    take(open_loader(shards, num_workers=1), 2)
    assert torch.equal(torch.rand(1), expected)


def test_long_samples_are_refused_or_skipped_and_counted(shards):
    with pytest.raises(ValueError, match=r"sample 0000000\d\d: .*seq_len=100"):
        open_loader(shards, seq_len=100)
    loader = open_loader(shards, seq_len=100, long_samples="skip")
    counts = loader.describe()
    assert 0 < counts["samples too long"] < 60
    assert counts["samples"] + counts["samples too long"] == 60
    keys = []
    for batch in loader:
        if batch["place"].epoch:
            break
        keys += batch["sample_keys"]
    assert len(keys) == len(set(keys)) == counts["samples"]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_evaluation_sees_every_sample_once(shards, world_size):
    ranks = [
        list(eval_batches(shards, tiny_processor(), 512, rank, world_size))
        for rank in range(world_size)
    ]
    keys = [key for batches in ranks for batch in batches for key in batch["sample_keys"]]
    assert sorted(keys) == sorted(sample.key for sample in Shards.open(shards))
    assert len({len(batches) for batches in ranks}) == 1
    assert all(batch["input_ids"].shape == (1, 512) for batches in ranks for batch in batches)


def test_evaluation_pads_with_empty_packs(tmp_path):
    shards = write_mixture(tmp_path, 3)
    ranks = [list(eval_batches(shards, tiny_processor(), 4096, rank, 3)) for rank in range(3)]
    assert [len(batches) for batches in ranks] == [1, 1, 1]
    assert [batches[0]["num_targets"] > 0 for batches in ranks] == [True, False, False]
    assert ranks[2][0]["sample_keys"] == []
