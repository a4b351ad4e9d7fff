import multiprocessing
import os
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.data.chats import make_shards
from triptych_data.shards import reader
from triptych_data.shards.index import read_index
from triptych_data.shards.reader import OPEN_FILES, Shards, find_shards


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_shards(tmp_path)
    return tmp_path / "shards"


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def read_keys(shards: Shards, numbers: list[int]) -> list[str]:
    return [shards.read(number).key for number in numbers]


def test_shards_read_as_one_sequence(folder):
    shards = Shards.open([folder])
    assert len(shards) == shards.num_samples == 12
    assert [shards.keys(i) for i in range(12)] == [f"{i:09d}" for i in range(12)]
    assert [sample.key for sample in shards] == [f"{i:09d}" for i in range(12)]
    sample = shards.read(7)
    assert sample.where == shards.where(7) == f"{folder}/shard-000001.tar: sample 000000007"
    assert sample.json == shards.read_json(7)
    assert sample.json["source"] == "test/7"
    assert len(sample.media) == 2


def test_a_pass_gives_what_single_reads_give(folder, monkeypatch):
    shards = Shards.open([folder])
    each = [shards.read_members(i) for i in range(12)]
    assert list(shards.members()) == each
    for stretch in (1, 3000, 10_000):
        monkeypatch.setattr(reader, "STRETCH", stretch)
        assert list(shards.members()) == each
    path = folder / "shard-000001.tar"
    data = path.read_bytes()
    path.write_bytes(data.replace(b"Picture 5", b"Picture 6"))
    with pytest.raises(ValueError, match=r"shard-000001\.tar: sample 000000005: "):
        list(shards.members())
    path.write_bytes(data[:-6000])
    with pytest.raises(ValueError, match=r"shard-000001\.tar: sample 00000000\d: "):
        list(shards.members())


def test_columns_are_those_of_the_samples(folder):
    shards = Shards.open([folder])
    assert shards.media_start.tolist() == [0, 0, 1, 3, 5, 5, 6, 8, 10, 10, 11, 13, 15]
    assert shards.media.size[shards.media_start[9] :][:1].tolist() == [[16 + 9, 8 + 9]]
    assert shards.text_bytes.shape == (12,)
    assert shards.media_start.dtype == shards.text_bytes.dtype == np.int64


def test_paths_may_be_files_folders_and_globs(folder, monkeypatch):
    files = sorted(folder.glob("*.tar"))
    assert find_shards([folder]) == find_shards([f"{folder}/*"]) == find_shards(files) == files
    assert find_shards(str(folder)) == files
    assert find_shards([files[2], folder]) == [files[2], files[0], files[1]]
    monkeypatch.chdir(folder)
    relative = find_shards(["shard-00000[12].tar", "../shards/*0.tar"])
    assert [path.resolve() for path in relative] == [files[1], files[2], files[0]]


def test_what_finds_nothing_is_an_error(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for path in ("nowhere", tmp_path / "empty", folder / "x*.tar"):
        with pytest.raises(ValueError) as error:
            Shards.open([folder, path])
        assert str(error.value).startswith(f"{path}: must be a shard")
    with pytest.raises(ValueError, match="must name at least one shard"):
        Shards.open([])
    (folder / "zero.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"zero\.tar.*run: triptych-data index"):
        Shards.open([folder])


def test_fingerprint_knows_the_order(folder):
    files = sorted(folder.glob("*.tar"))
    assert Shards.open([folder]).fingerprint == Shards.open(files).fingerprint
    assert Shards.open([folder]).fingerprint != Shards.open(files[::-1]).fingerprint


@pytest.mark.parametrize("number", [-1, 12])
def test_numbers_out_of_range_are_an_error(folder, number):
    with pytest.raises(IndexError, match=r"must be in \[0, 12\)"):
        Shards.open([folder]).read(number)


def test_a_flipped_bit_is_named_by_shard_and_key(folder):
    shards = Shards.open([folder])
    path = folder / "shard-000001.tar"
    data = bytearray(path.read_bytes())
    data[int(read_index(path).member_offset[3]) + 100] ^= 4
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"shard-000001\.tar: sample 000000006: .*must be those"):
        shards.read(6)
    assert shards.read(5).key == "000000005"
    assert shards.read_json(6) is not None, "the flip is in an image, not in the JSON"


def test_a_tail_lost_after_opening_is_found(folder):
    shards = Shards.open([folder])
    path = folder / "shard-000002.tar"
    os.truncate(path, path.stat().st_size - 3000)
    with pytest.raises(ValueError, match=r"shard-000002\.tar: sample 000000011"):
        shards.read(11)
    with pytest.raises(ValueError, match=r"shard-000002\.tar: must have the \d+ bytes"):
        Shards.open([folder])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_read_the_same(folder, method):
    shards = Shards.open([folder])
    shards.read(0)  # descriptors are open before the fork
    with multiprocessing.get_context(method).Pool(2) as pool:
        jobs = [(shards, list(range(start, 12, 2))) for start in (0, 1)]
        assert pool.starmap(read_keys, jobs) == [[f"{i:09d}" for i in job[1]] for job in jobs]


def test_pickled_shards_are_the_same(folder):
    shards = Shards.open([folder])
    copy = pickle.loads(pickle.dumps(shards))
    assert copy.fingerprint == shards.fingerprint
    assert copy.read(7) == shards.read(7)


def test_few_files_stay_open(tmp_path):
    make_shards(tmp_path, count=OPEN_FILES + 20, samples_per_shard=1)
    shards = Shards.open([tmp_path / "shards"])
    before = open_files()
    threads = [threading.Thread(target=list, args=(shards,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    del thread, threads
    assert open_files() - before <= OPEN_FILES
    del shards
    assert open_files() <= before
