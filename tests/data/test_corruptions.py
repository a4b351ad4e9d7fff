"""1,000 seeded corruptions of shards and indexes: none may pass in silence."""

import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data.chats import make_shards
from triptych_data.shards.index import index_paths, read_index
from triptych_data.shards.reader import Shards
from triptych_data.shards.verify import verify_shards

TRIALS = 1000
Files = dict[Path, bytes]
"""The files that a corruption changes, with their new content."""


def flip_a_bit(chance: random.Random, path: Path, files: Files) -> Files:
    data = bytearray(files[path])
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return {path: bytes(data)}


def flip_many(chance: random.Random, path: Path, files: Files) -> Files:
    data = bytearray(files[path])
    for _ in range(chance.randrange(2, 50)):
        data[chance.randrange(len(data))] ^= chance.randrange(1, 256)
    return {path: bytes(data)}


def truncate(chance: random.Random, path: Path, files: Files) -> Files:
    return {path: files[path][: chance.randrange(len(files[path]))]}


def append(chance: random.Random, path: Path, files: Files) -> Files:
    size = chance.choice([1, 8, 512, 1024, 10_240])
    return {path: files[path] + chance.choice([bytes(size), chance.randbytes(size)])}


def zero_a_stretch(chance: random.Random, path: Path, files: Files) -> Files:
    data = files[path]
    start, size = chance.randrange(len(data)), chance.choice([1, 8, 512, 4096])
    zeros = bytes(len(data[start : start + size]))
    return {path: data[:start] + zeros + data[start + size :]}


def repeat_a_block(chance: random.Random, path: Path, files: Files) -> Files:
    data, size = files[path], 512 if path.suffix == ".tar" else 8
    start = chance.randrange(len(data) // size) * size
    return {path: data[: start + size] + data[start : start + size] + data[start + size :]}


def lose_a_block(chance: random.Random, path: Path, files: Files) -> Files:
    data, size = files[path], 512 if path.suffix == ".tar" else 8
    start = chance.randrange(len(data) // size) * size
    return {path: data[:start] + data[start + size :]}


def exchange_blocks(chance: random.Random, path: Path, files: Files) -> Files:
    data, size = bytearray(files[path]), 512 if path.suffix == ".tar" else 8
    first, second = (chance.randrange(len(data) // size) * size for _ in range(2))
    a, b = data[first : first + size], data[second : second + size]
    data[first : first + size], data[second : second + size] = b, a
    return {path: bytes(data)}


def other_kind(path: Path, chance: random.Random, files: Files) -> Path:
    """The same file of another shard."""
    mine = path.name.partition(".tar")[2]
    return chance.choice([p for p in files if p != path and p.name.partition(".tar")[2] == mine])


def take_anothers(chance: random.Random, path: Path, files: Files) -> Files:
    return {path: files[other_kind(path, chance, files)]}


def swap(chance: random.Random, path: Path, files: Files) -> Files:
    other = other_kind(path, chance, files)
    return {path: files[other], other: files[path]}


def take_anothers_index(chance: random.Random, path: Path, files: Files) -> Files:
    tars = [p for p in files if p.suffix == ".tar"]
    mine, other = chance.sample(tars, 2)
    pairs = zip(index_paths(mine), index_paths(other), strict=True)
    return {to: files[source] for to, source in pairs}


def swap_a_sample(chance: random.Random, path: Path, files: Files) -> Files:
    """A sample's whole span replaced by another's: headers, key and content fit each other."""
    tar = Path(re.sub(r"\.tar\..*", ".tar", str(path)))
    starts = read_index(tar).sample_start.tolist()
    a, b = chance.sample(range(len(starts) - 1), 2)
    data, span = files[tar], files[tar][starts[b] : starts[b + 1]]
    return {tar: data[: starts[a]] + span + data[starts[a + 1] :]}


def edit_the_metadata(chance: random.Random, path: Path, files: Files) -> Files:
    """A digit of the JSON in the columns' header becomes another: still well-formed."""
    columns = index_paths(Path(re.sub(r"\.tar\..*", ".tar", str(path))))[1]
    data = bytearray(files[columns])
    length = int.from_bytes(data[:8], "little")
    digits = [i for i in range(8, 8 + length) if chr(data[i]).isdigit()]
    spot = chance.choice(digits)
    data[spot] = ord(chance.choice([d for d in "0123456789" if ord(d) != data[spot]]))
    return {columns: bytes(data)}


def noise(chance: random.Random, path: Path, files: Files) -> Files:
    return {path: chance.randbytes(len(files[path]))}


def empty(chance: random.Random, path: Path, files: Files) -> Files:
    return {path: b""}


CORRUPTIONS: list[Callable[[random.Random, Path, Files], Files]] = [
    flip_a_bit,
    flip_a_bit,
    flip_many,
    truncate,
    append,
    zero_a_stretch,
    repeat_a_block,
    lose_a_block,
    exchange_blocks,
    take_anothers,
    swap,
    take_anothers_index,
    swap_a_sample,
    edit_the_metadata,
    noise,
    empty,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("made")
    make_shards(made, count=12, samples_per_shard=4)
    return made / "shards"


def read_all(folder: Path) -> list[tuple]:
    return [(sample.key, sample.json, sample.media) for sample in Shards.open([folder])]


def test_no_corruption_is_silent(folder):
    chance = random.Random(0)
    files = {path: path.read_bytes() for path in sorted(folder.iterdir())}
    sound, outcomes = read_all(folder), Counter[str]()
    assert verify_shards(folder).ok and len(files) == 9
    for trial in range(TRIALS):
        corrupt = CORRUPTIONS[trial % len(CORRUPTIONS)]
        changed = corrupt(chance, chance.choice(list(files)), files)
        changed = {path: data for path, data in changed.items() if data != files[path]}
        if not changed:
            outcomes["nothing changed"] += 1
            continue
        for path, data in changed.items():
            path.write_bytes(data)
        what = f"trial {trial}, {corrupt.__name__} of {[path.name for path in changed]}"
        stems = {path.name.partition(".tar")[0] for path in changed}
        try:
            assert read_all(folder) == sound, f"{what}: other samples were read"
            outcomes["read as before"] += 1
        except ValueError as error:
            assert any(stem in str(error) for stem in stems), f"{what}: {error}"
            outcomes["refused"] += 1
        report = verify_shards(folder)
        assert any(stem in p.path for p in report.problems for stem in stems), what
        for path in changed:
            path.write_bytes(files[path])
    assert verify_shards(folder).ok and read_all(folder) == sound
    assert outcomes["refused"] > 700, outcomes
    assert outcomes["nothing changed"] < 120, outcomes


@pytest.mark.parametrize("kind", [".tar", ".idx", ".columns"])
def test_a_lost_file_is_named(folder, kind):
    path = next(p for p in sorted(folder.iterdir()) if p.suffix == kind)
    data = path.read_bytes()
    path.unlink()
    report = verify_shards(folder)
    problems = {(p.kind, p.path) for p in report.problems}
    assert ("missing", str(path)) in problems
    path.write_bytes(data)
    assert verify_shards(folder).ok
