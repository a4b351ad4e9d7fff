"""Stop anywhere, go on with other ranks and workers: the stream of packs is the same."""

import json
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from contextlib import ExitStack, closing
from functools import cache
from itertools import chain, islice

import pytest

from tests.data.chats import chat, write_jsonl
from tests.data.packs import WORDS, tiny_config, tiny_processor
from triptych_data.loader import PackLoader
from triptych_data.shards.write import write_shards

COUNTS = {"big": 150, "small": 40}
KINDS = {
    "shuffle": {"seq_len": 56, "shards": ["big"]},  # a sample or two a pack
    "pack": {"seq_len": 256, "shards": ["big"], "window": 64},
    "mix": {"seq_len": 256, "window": 64, "sources": {"big": {}, "small": {"repeat": 2}}},
    "weights": {
        "seq_len": 256,
        "window": 64,
        "sources": {"big": {"weight": [[0, 3], [200, 1]]}, "small": {"weight": 1}},
    },
}
RANKS, WORKERS = (1, 2, 4), (0, 2, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two sources of short texts."""
    path = tmp_path_factory.mktemp("texts")
    for name, count in COUNTS.items():
        rng = random.Random(name)
        records = [
            chat(answer=" ".join(rng.choices(WORDS, k=rng.randint(1, 12)))) for _ in range(count)
        ]
        source = write_jsonl(path / f"{name}.jsonl", records)
        write_shards(source, path / name, samples_per_shard=32)
    return path


def settings_of(kind, folder):
    settings = dict(KINDS[kind])
    if "shards" in settings:
        return settings | {"shards": [str(folder / name) for name in settings["shards"]]}
    sources = {
        name: wish | {"shards": [str(folder / name)]} for name, wish in settings["sources"].items()
    }
    return settings | {"shards": None, "sources": sources}


class Job:
    """All ranks of a job in one process; a step takes one batch of each rank."""

    def __init__(self, kind, folder, ranks, workers, state=None):
        config = tiny_config(**settings_of(kind, folder), num_workers=workers)
        self.loaders = [
            PackLoader(config, tiny_processor(), rank=rank, world_size=ranks)
            for rank in range(ranks)
        ]
        for loader in self.loaders:
            if state is not None:
                loader.load_state_dict(state)
        self.stack = ExitStack()
        self.streams = [self.stack.enter_context(closing(iter(x))) for x in self.loaders]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.stack.close()

    def step(self):
        """The packs of a step, in the order of ranks, as lists of samples."""
        return [next(stream)["sample_ids"] for stream in self.streams]

    def state(self):
        """The state to save: the same on all ranks, and it survives JSON."""
        (state,) = {json.dumps(loader.state_dict()) for loader in self.loaders}
        return json.loads(state)


@cache
def reference(kind, folder):
    """Two epochs and a bit by one rank without workers: (epoch, samples) of each pack."""
    with Job(kind, folder, 1, 0) as job:
        packs = []
        for batch in job.streams[0]:
            packs.append((batch["place"].epoch, batch["sample_ids"]))
            if batch["place"].epoch == 2 and len(packs) % 8 == 0:
                return packs
    return packs


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_holds_every_sample_once_and_the_next_is_another(kind, folder):
    epochs = [[], []]
    for epoch, samples in reference(kind, folder):
        if epoch < 2:
            epochs[epoch].append(samples)
    assert epochs[0] != epochs[1]
    first, second = (Counter(chain(*packs)) for packs in epochs)
    if kind != "weights":  # else there are no epochs
        repeats = 2 if kind == "mix" else 0
        expected = dict.fromkeys(range(150), 1) | {150 + i: repeats for i in range(40) if repeats}
        assert first == second == expected


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("kind", KINDS)
def test_resumed_on_other_ranks_and_workers(kind, folder, ranks, workers):
    rng = random.Random(f"{kind} {ranks} {workers}")
    expected = [samples for _, samples in reference(kind, folder)]
    stop = rng.randrange(1, len(expected) // ranks)
    with Job(kind, folder, ranks, workers) as job:
        got = [samples for _ in range(stop) for samples in job.step()]
        state = job.state()
    others = [(r, w) for r in RANKS for w in WORKERS if r != ranks and w != workers]
    other_ranks, other_workers = rng.choice(others)
    with Job(kind, folder, other_ranks, other_workers, state) as job:
        while len(got) + other_ranks <= len(expected):
            got += job.step()
    assert got == expected[: len(got)]
    assert len(got) > len(expected) - other_ranks


def run_until_killed(path, kind, folder):
    """A real process of two ranks that notes every step, and saves every third one."""
    with Job(kind, folder, 2, 1) as job, path.open("w") as file:
        for step in range(1, 10**6):
            line = {"packs": job.step(), "state": job.state() if step % 3 == 0 else None}
            file.write(json.dumps(line) + "\n")
            file.flush()


@pytest.mark.parametrize("kind", KINDS)
def test_killed_without_warning(kind, folder, tmp_path):
    path = tmp_path / "steps.jsonl"
    expected = [samples for _, samples in reference(kind, folder)]
    context = multiprocessing.get_context("fork")
    process = context.Process(target=run_until_killed, args=(path, kind, folder))
    process.start()
    wanted = random.Random(kind).randrange(4, len(expected) // 4)
    while not path.exists() or path.read_text().count("\n") < wanted:
        assert process.is_alive()
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    lines = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    saved = max(i for i, line in enumerate(lines) if line["state"])
    got = [samples for line in lines[: saved + 1] for samples in line["packs"]]
    with Job(kind, folder, 4, 0, lines[saved]["state"]) as job:
        while len(got) + 4 <= len(expected):
            got += job.step()
    assert got[: len(expected)] == expected[: len(got)]


def test_the_first_batch_comes_at_once_at_any_depth(folder):
    seconds = []
    for position in (0, 10**4, 10**7):
        loader = Job("pack", folder, 1, 0).loaders[0]
        window = loader.plan.mixture.window_at(position)
        loader.position = loader.plan.mixture.start(window)
        started = time.perf_counter()
        with closing(iter(loader)) as stream:
            (batch,) = islice(stream, 1)
        seconds.append(time.perf_counter() - started)
        assert abs(batch["place"].position - position) <= 64
    assert max(seconds) < 1
