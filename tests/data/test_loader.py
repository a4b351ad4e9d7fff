import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from itertools import chain, islice
from pathlib import Path

import pytest
import torch

from tests.data.chats import chat as make_chat
from tests.data.chats import encoded_image
from tests.data.packs import MODEL, tiny_config, tiny_processor, write_mixture
from triptych_data.index import write_index
from triptych_data.loader import PackLoader, eval_batches
from triptych_data.processor import Processor
from triptych_data.reader import Shards
from triptych_data.scan import build_index


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_mixture(tmp_path_factory.mktemp("mixture"))


def open_loader(shards, rank=0, world_size=1, **settings):
    config = tiny_config(shards, **settings)
    return PackLoader(config, tiny_processor(), rank=rank, world_size=world_size)


def take(loader, count):
    return [batch["sample_keys"] for batch in islice(loader, count)]


def stream(shards, world_size, steps, position=0, **settings):
    """What all ranks together see, step by step: the sets of packs of each step."""
    ranks = []
    for rank in range(world_size):
        loader = open_loader(shards, rank, world_size, **settings)
        loader.position = position
        ranks.append(take(loader, steps))
    packs = []
    for step in range(steps):
        turn = {(position + i) % world_size: i for i in range(world_size)}
        packs += [ranks[r][step] for r in sorted(range(world_size), key=turn.__getitem__)]
        position += world_size
    return packs


@pytest.fixture(scope="module")
def two_epochs(shards):
    loader = open_loader(shards)
    loader.plan.epoch(0)
    while len(loader.plan.epoch_starts) < 3:
        loader.plan.pack(loader.plan.epoch_starts[-1])
    return take(loader, loader.plan.epoch_starts[2]), loader.plan.epoch_starts[1]


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


@pytest.mark.parametrize("position", [0, 1, 3, 10])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_resume_anywhere_on_another_world_size(shards, two_epochs, world_size, position):
    packs, _ = two_epochs
    steps = (len(packs) - position) // world_size
    got = stream(shards, world_size, steps, position)
    assert got == packs[position : position + steps * world_size]


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


def test_state_counts_what_was_yielded(shards, two_epochs):
    packs, _ = two_epochs
    loader = open_loader(shards, rank=1, world_size=2, num_workers=1, prefetch=4)
    batches = iter(loader)
    assert loader.state_dict()["position"] == 0
    for step in range(3):
        assert next(batches)["sample_keys"] == packs[2 * step + 1]
        assert loader.state_dict()["position"] == 2 * (step + 1)
    resumed = open_loader(shards)
    resumed.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    assert take(resumed, 4) == packs[6:10]
    assert resumed.position == 10


def test_state_knows_epochs_only_up_to_its_position(shards, two_epochs):
    _, second = two_epochs
    loader = open_loader(shards)
    loader.plan.pack(5 * second)
    loader.position = second
    assert loader.state_dict()["epoch_starts"] == [0, second]


def test_position_may_be_set_while_iterating(shards, two_epochs):
    packs, _ = two_epochs
    loader = open_loader(shards)
    batches = iter(loader)
    next(batches)
    loader.position = 7
    assert next(batches)["sample_keys"] == packs[7]
    assert loader.position == 8


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("seed", {"seed": 1}),
        ("seq_len", {"seq_len": 640}),
        ("open_bins", {"open_bins": 4}),
        ("max_patches", {"max_patches": 5000}),
        ("long_samples", {"long_samples": "skip"}),
    ],
)
def test_state_of_another_plan_is_refused(shards, name, changed):
    state = open_loader(shards).state_dict()
    with pytest.raises(ValueError, match=f"checkpoint data state: {name} must be"):
        open_loader(shards, **changed).load_state_dict(state)


def test_state_of_other_data_or_processor_is_refused(shards, tmp_path):
    state = open_loader(shards).state_dict()
    with pytest.raises(ValueError, match="data state: data must be"):
        open_loader(write_mixture(tmp_path, 10)).load_state_dict(state)
    small = Processor.from_directory(MODEL, max_pixels=1024)
    loader = PackLoader(tiny_config(shards), small, rank=0, world_size=1)
    with pytest.raises(ValueError, match="data state: processor must be"):
        loader.load_state_dict(state)
    with pytest.raises(ValueError, match="data state: data must be"):
        open_loader(shards).load_state_dict({"position": 3})


def test_seed_gives_another_order(shards):
    assert take(open_loader(shards), 5) != take(open_loader(shards, seed=1), 5)


def test_iterating_leaves_the_global_random_stream_alone(shards):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    take(open_loader(shards), 2)
    assert torch.equal(torch.rand(1), expected)


def test_long_samples_are_refused_or_skipped_and_counted(shards):
    with pytest.raises(ValueError, match=r"sample 0000000\d\d: .*seq_len=100"):
        open_loader(shards, seq_len=100)
    loader = open_loader(shards, seq_len=100, long_samples="skip")
    assert 0 < loader.num_skipped < 60
    starts = loader.plan.pack(0) and loader.plan.epoch_starts
    keys = list(chain(*take(loader, starts[1])))
    assert len(keys) == len(set(keys)) == 60 - loader.num_skipped


@pytest.mark.parametrize("num_workers", [0, 2])
def test_corrupt_image_is_named(tmp_path, num_workers):
    tar = tmp_path / "made-elsewhere.tar"
    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as file:
        for i in range(9):
            image = encoded_image(64, 48)[: 800 if i == 5 else None]
            part = {"type": "image", "index": 0}
            record = {"messages": [{"role": "user", "content": [part]}, make_chat()["messages"][1]]}
            for suffix, data in (("json", json.dumps(record).encode()), ("0.jpg", image)):
                info = tarfile.TarInfo(f"s{i}.{suffix}")
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
    write_index(tar, build_index(tar))
    loader = open_loader([str(tar)], seq_len=128, num_workers=num_workers)
    message = r"^\S*made-elsewhere\.tar: sample s5: image 0: .* must be a whole JPEG"
    with pytest.raises(ValueError, match=message):
        take(loader, 9)


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


SCRIPT = """
import sys
from triptych_data.config import DataConfig
from triptych_data.loader import PackLoader
from triptych_data.processor import Processor
if __name__ == "__main__":
    config = DataConfig(shards=[sys.argv[1]], seq_len=512, num_workers=2)
    loader = PackLoader(config, Processor.from_directory(sys.argv[2]), rank=0, world_size=1)
    for batch in loader:
        print("batch", flush=True)
"""


@pytest.mark.parametrize(
    "killer", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_workers_end_with_the_parent(shards, tmp_path, killer):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), shards[0], str(MODEL)]
    trainer = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    assert trainer.stdout.readline() == b"batch\n"
    group = members(trainer.pid)
    assert len(group) >= 4  # trainer, fork server, two workers
    (os.killpg if killer == signal.SIGINT else os.kill)(trainer.pid, killer)
    trainer.stdout.close()
    trainer.wait(20)
    deadline = time.monotonic() + 20
    while members(trainer.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not members(trainer.pid)
    assert b"ForkServerProcess" not in trainer.stderr.read()  # no worker has a say


def members(session):
    """The living processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, *fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended meanwhile
        if int(fields[2]) == session and state != "Z":
            found.append(int(stat.parent.name))
    return found
