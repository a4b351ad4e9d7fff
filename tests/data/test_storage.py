import multiprocessing
import os
import pickle
import random
import signal
import time
from pathlib import Path
from typing import ClassVar

import fsspec
import numpy as np
import pytest

from tests.data.chats import make_shards
from tests.data.webserver import serving
from triptych_data.config import DataConfig
from triptych_data.shards.locate import expand_braces, find_shards
from triptych_data.shards.reader import Shards
from triptych_data.storage import local
from triptych_data.storage.cache import BlockCache
from triptych_data.storage.local import MappedFile, PlainFile, open_local
from triptych_data.storage.open import Storage
from triptych_data.storage.remote import Patience, shown

PATIENCE = Patience(attempts=3, timeout=0.3, backoff=0.01)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("made")
    make_shards(made)
    return made / "shards"


@pytest.fixture
def server(folder):
    with serving(folder) as server:
        yield server


@pytest.fixture
def storage(tmp_path) -> Storage:
    return Storage(str(tmp_path / "blocks"), 10_000_000, block_bytes=4096, patience=PATIENCE)


def blocks(storage: Storage) -> list[Path]:
    found = Path(storage.cache_dir).glob("[0-9a-f][0-9a-f]/*")
    return sorted(found)


def as_read(shards: Shards) -> list[tuple]:
    return [(sample.key, sample.json, sample.media) for sample in shards]


def test_remote_shards_read_as_local_ones(folder, server, storage):
    local_shards = Shards.open([folder])
    remote = Shards.open([server.url + "/shard-{000000..000002}.tar"], storage)
    assert remote.fingerprint == local_shards.fingerprint
    assert as_read(remote) == as_read(local_shards)
    assert remote.read_json(7) == local_shards.read_json(7)
    assert remote.where(7) == f"{server.url}/shard-000001.tar: sample 000000007"


def test_what_was_read_is_not_asked_for_again(server, storage):
    urls = [server.url + "/shard-{000000..000002}.tar"]
    first = as_read(Shards.open(urls, storage))
    server.requests.clear()
    assert as_read(Shards.open(urls, storage)) == first
    assert server.gets() == 0 and len(server.requests) == 6, "only whether the indexes changed"


def test_without_a_cache_a_sample_is_one_request(server, tmp_path):
    shards = Shards.open([server.url + "/shard-000001.tar"], Storage(cache_bytes=0))
    server.requests.clear()
    shards.read(2)
    index = shards.indexes[0]
    start, end = index.sample_start[2:4].tolist()
    assert server.requests == [("GET", "/shard-000001.tar", f"bytes={start}-{end - 1}")]


def test_samples_are_warmed_together(server, storage):
    shards = Shards.open([server.url + "/shard-{000000..000002}.tar"], storage)
    shards.warm(range(12))
    server.requests.clear()
    assert len(as_read(shards)) == 12 and not server.requests
    Shards.open([server.folder]).warm(range(12))


@pytest.mark.parametrize(
    "fault", ["unavailable", "stall", "cut", "hang_up", "trickle", "elsewhere", "endless"]
)
def test_what_fails_twice_is_read_in_the_end(folder, server, storage, fault):
    shards = Shards.open([server.url + "/shard-000001.tar"], storage)
    server.fault, server.faults = fault, 2
    start = time.monotonic()
    assert shards.read(0).media == Shards.open([folder]).read(5).media
    assert server.faults == 0
    assert time.monotonic() - start < 3, "a trickle is not waited for"


@pytest.mark.parametrize("fault", ["unavailable", "stall", "cut", "hang_up", "trickle"])
def test_what_fails_on_is_an_error_that_names_the_file(server, storage, fault):
    shards = Shards.open([server.url + "/shard-000001.tar"], storage)
    server.fault, server.faults = fault, 99
    with pytest.raises(ConnectionError) as error:
        shards.read(0)
    assert str(error.value).startswith(f"{server.url}/shard-000001.tar: the server must answer")
    assert "at the last of 3 attempts" in str(error.value)
    assert " object at 0x" not in str(error.value)
    assert server.faults == 99 - 3
    server.faults = 0
    assert shards.read(0).key == "000000005", "and the next try is a new one"


def test_faults_while_the_index_is_fetched_are_retried(server, storage):
    server.fault, server.faults = "unavailable", 2
    assert Shards.open([server.url + "/shard-000001.tar"], storage).num_samples == 5


def test_a_server_that_ignores_ranges_sends_a_file_once(folder, server, storage):
    server.ranges = False
    shards = Shards.open([server.url + "/shard-000001.tar"], storage)
    assert as_read(shards) == as_read(Shards.open([folder / "shard-000001.tar"]))
    assert server.gets("shard-000001.tar") == 2, "once to find out, then all of it"
    again = Shards.open([server.url + "/shard-000002.tar"], storage)
    server.fault, server.faults = "cut_whole", 1
    assert len(as_read(again)) == 2
    assert server.gets("shard-000002.tar") == 3, "a transfer that breaks off is begun again"


def test_a_server_that_ignores_ranges_needs_a_cache(server):
    server.ranges = False
    shards = Shards.open([server.url + "/shard-000001.tar"], Storage(cache_bytes=0))
    with pytest.raises(ValueError, match=r"shard-000001\.tar: the server must answer requests for"):
        shards.read(0)


def test_redirects_are_followed_and_queries_kept(server, storage):
    shards = Shards.open([f"{server.url}/moved/shard-000001.tar?token=secret"], storage)
    assert shards.read(0).key == "000000005"
    assert "secret" not in shards.where(0)
    assert ("HEAD", "/moved/shard-000001.tar.idx", "") in server.requests


def test_messages_hold_no_secrets():
    assert shown("https://user:pass@host/x.tar?X-Sig=abc") == "https://host/x.tar"


def test_what_is_refused_is_not_tried_again(server, storage):
    with pytest.raises(ValueError, match=r"none\.tar\.columns: a shard must have its index"):
        Shards.open([server.url + "/none.tar"], storage)
    shards = Shards.open([server.url + "/shard-000001.tar"], storage)
    server.fault, server.faults = "forbidden", 99
    with pytest.raises(ValueError, match=r"shard-000001\.tar: the server must hand out .* 403"):
        shards.read(0)
    assert server.faults == 98


def test_no_server_is_an_error(storage):
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:9/x\.tar\.columns: the server must"):
        Shards.open(["http://127.0.0.1:9/x.tar"], storage)


def test_a_changed_index_is_fetched_anew(tmp_path, storage):
    make_shards(tmp_path, count=3)
    with serving(tmp_path / "shards") as server:
        url = server.url + "/shard-000000.tar"
        assert Shards.open([url], storage).num_samples == 3
        for path in (tmp_path / "shards").iterdir():
            path.unlink()
        make_shards(tmp_path, count=4)
        assert Shards.open([url], storage).num_samples == 4
        server.etags = False
        assert Shards.open([url], storage).num_samples == 4


def test_a_shard_that_is_not_the_indexed_one_is_named(tmp_path, storage):
    make_shards(tmp_path, count=3)
    tar = tmp_path / "shards" / "shard-000000.tar"
    with serving(tmp_path / "shards") as server:
        shards = Shards.open([server.url + "/shard-000000.tar"], storage)
        data = bytearray(tar.read_bytes())
        data[600] ^= 1
        tar.write_bytes(data)
        with pytest.raises(ValueError, match=r"shard-000000\.tar: sample 000000000: .* checksum"):
            shards.read(0)
        os.truncate(tar, 2000)
        with pytest.raises(ValueError, match=r"shard-000000\.tar: must .* as its index says"):
            shards.read(2)


def test_damage_in_the_cache_heals(folder, server, storage):
    shards = Shards.open([server.url + "/shard-000001.tar"], storage)
    expected = as_read(shards)
    for path in blocks(storage):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    assert as_read(shards) == expected
    for path in blocks(storage):
        os.truncate(path, 5)
    assert as_read(shards) == expected
    for path in blocks(storage):
        path.write_bytes(b"")
    assert as_read(Shards.open([server.url + "/shard-000001.tar"], storage)) == expected


def test_damage_of_an_index_in_the_cache_heals(server, storage):
    url = server.url + "/shard-000001.tar"
    sound = Shards.open([url], storage)
    for path in blocks(storage):
        path.write_bytes(bytes(path.stat().st_size))
    assert Shards.open([url], storage).fingerprint == sound.fingerprint


def test_memory_objects_are_read_through_fsspec(folder, storage):
    system = fsspec.filesystem("memory")
    for path in folder.iterdir():
        system.pipe(f"/bucket/{path.name}", path.read_bytes())
    expected = as_read(Shards.open([folder]))
    for name in ("bucket", "bucket/", "bucket/*.tar", "bucket/shard-{000000..000002}.tar"):
        assert as_read(Shards.open([f"memory://{name}"], storage)) == expected
    assert as_read(Shards.open(["memory://bucket"], Storage(cache_bytes=0))) == expected
    with pytest.raises(ValueError, match=r"memory://bucket/none.*must be a shard"):
        Shards.open(["memory://bucket/none*.tar"], storage)
    with pytest.raises(ValueError, match=r"none\.tar\.columns: a shard must have its index"):
        Shards.open(["memory://bucket/none.tar"], storage)
    system.rm("/bucket", recursive=True)


def test_a_file_system_that_hangs_or_fails_is_given_up(folder, storage):
    class Hanging(fsspec.get_filesystem_class("memory")):
        protocol = "hanging"
        cachable = False
        store: ClassVar[dict] = {}
        wait = 0.0

        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(path.replace("hanging://", "memory://"))

        def cat_file(self, path, start=None, end=None, **options):
            time.sleep(self.wait)
            return super().cat_file(path, start=start, end=end, **options)

    fsspec.register_implementation("hanging", Hanging, clobber=True)
    system = fsspec.filesystem("hanging")
    for path in folder.iterdir():
        system.pipe(f"/b/{path.name}", path.read_bytes())
    shards = Shards.open(["hanging://b/shard-000000.tar"], storage)
    Hanging.wait = 2.0
    with pytest.raises(ConnectionError, match=r"hanging://b/shard-000000\.tar: .*no answer in"):
        shards.read(0)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("pipe:cat x.tar", "got a command, which is never run"),
        ("simplecache::s3://b/x.tar", "must be one URL, got a chain"),
        ("nosuch://b/x.tar", "must be a URL of http, https or a scheme that fsspec knows"),
        ("http://host/folder/", "a web server lists no files"),
        ("http://host/*.tar", "a web server lists no files"),
    ],
)
def test_what_is_no_place_for_shards_is_refused(storage, path, message):
    with pytest.raises(ValueError) as error:
        Shards.open([path], storage)
    assert message in str(error.value) and path[:4] in str(error.value)


def test_a_missing_scheme_says_what_to_install(storage):
    if fsspec.available_protocols() and _importable("s3fs"):
        pytest.skip("s3fs is installed")
    with pytest.raises(ValueError, match="install it: s3fs for s3://"):
        Shards.open(["s3://bucket/x.tar"], storage)


def _importable(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None


def test_braces_expand_as_in_a_shell():
    assert list(expand_braces("a{08..11}.tar")) == ["a08.tar", "a09.tar", "a10.tar", "a11.tar"]
    assert list(expand_braces("{a,b}/{2..1}")) == ["a/2", "a/1", "b/2", "b/1"]
    assert list(expand_braces("a{b}c{}")) == ["a{b}c{}"]
    for bomb in ("{0..99999999999}", "{0..9999}" * 3):
        with pytest.raises(ValueError, match="at most 1000000"):
            list(expand_braces(bomb))


def test_braces_name_each_file(folder, tmp_path):
    files = sorted(folder.glob("*.tar"))
    assert find_shards([f"{folder}/shard-{{000000..000002}}.tar"]) == files
    assert find_shards([f"{folder}/shard-00000{{2,0}}.tar"]) == [files[2], files[0]]
    assert find_shards([f"file://{folder}"]) == files
    with pytest.raises(ValueError, match=r"shard-000003\.tar: must be a shard"):
        find_shards([f"{folder}/shard-{{000000..000003}}.tar"])
    odd = tmp_path / "a{1..2}.tar"
    odd.write_bytes(b"")
    assert find_shards([odd]) == [odd]


def test_the_cache_is_bounded_and_drops_what_was_not_used(tmp_path):
    cache = BlockCache(tmp_path, 100_000)
    for block in range(30):
        cache.store("file", block, bytes([block]) * 10_000)
        used = sum(path.stat().st_size for path in tmp_path.glob("??/*"))
        assert used <= 100_000
        os.utime(cache._path("file", block), (block + 1, block + 1))
        assert cache.read("file", 0, 0, 10_000) == bytes(10_000), "what is used stays"
    assert cache.read("file", 29, 0, 10_000) == bytes([29]) * 10_000
    assert cache.read("file", 10, 0, 10_000) is None
    cache.store("file", 99, bytes(100_001))
    assert cache.read("file", 99, 0, 1) is None, "what can never fit is not kept"


def test_a_cache_that_cannot_be_written_is_no_cache(folder, server, tmp_path):
    (tmp_path / "file").write_text("in the way")
    storage = Storage(str(tmp_path / "file"), patience=PATIENCE)
    shards = Shards.open([server.url + "/shard-000001.tar"], storage)
    assert as_read(shards) == as_read(Shards.open([folder / "shard-000001.tar"]))


def read_at_random(folder: str, seed: int, seconds: float) -> int:
    """Reads and stores in a cache too small for all; returns how many blocks were wrong."""
    chance, cache, wrong = random.Random(seed), BlockCache(Path(folder), 200_000), 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        block = chance.randrange(40)
        data = cache.read("file", block, 0, 10_000)
        if data is None:
            cache.store("file", block, bytes([block]) * 10_000)
        else:
            wrong += data != bytes([block]) * 10_000
    return wrong


def test_processes_share_a_cache_and_may_be_killed(tmp_path):
    context = multiprocessing.get_context("fork")
    with context.Pool(3) as pool:
        jobs = [pool.apply_async(read_at_random, (str(tmp_path), i, 1.5)) for i in range(3)]
        for seed in range(10):  # all the while others come and are killed
            victim = context.Process(target=read_at_random, args=(str(tmp_path), 10 + seed, 9.0))
            victim.start()
            time.sleep(0.1)
            os.kill(victim.pid, signal.SIGKILL)
            victim.join()
        assert [job.get(30) for job in jobs] == [0, 0, 0]
    used = sum(path.stat().st_size for path in tmp_path.glob("??/*"))
    assert used <= 200_000 + 10 * 10_000, "a kill may leave its block uncounted"
    for path in (tmp_path / "new").iterdir():
        os.utime(path, (1, 1))
    cache = BlockCache(tmp_path, 200_000)
    for block in range(100, 140):
        cache.store("file", block, bytes(10_000))
    assert not list((tmp_path / "new").iterdir()), "leftovers go when room is made"
    assert sum(path.stat().st_size for path in tmp_path.glob("??/*")) <= 200_000


def read_all(shards: Shards, seed: int) -> list[str]:
    order = random.Random(seed).sample(range(len(shards)), len(shards))
    return sorted(shards.read(i).key for i in order)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_read_remote_shards(server, tmp_path, method):
    """A cache smaller than the data, and connections that are open before a fork."""
    storage = Storage(str(tmp_path / "b"), 20_000, block_bytes=4096, patience=Patience(timeout=5))
    shards = Shards.open([server.url + "/shard-{000000..000002}.tar"], storage)
    shards.read(0)
    with multiprocessing.get_context(method).Pool(2) as pool:
        keys = pool.starmap(read_all, [(shards, seed) for seed in range(4)])
    assert keys == [[f"{i:09d}" for i in range(12)]] * 4
    assert sum(path.stat().st_size for path in blocks(storage)) <= 20_000


def test_a_block_is_fetched_once_by_many(server, tmp_path):
    storage = Storage(str(tmp_path / "b"), patience=Patience(timeout=5))
    shards = Shards.open([server.url + "/shard-000000.tar"], storage)
    server.requests.clear()
    with multiprocessing.get_context("fork").Pool(4) as pool:
        pool.starmap(read_all, [(shards, seed) for seed in range(4)])
    assert server.gets() == 1


def test_mapped_and_plain_files_read_the_same(folder, monkeypatch):
    path = folder / "shard-000001.tar"
    mapped = open_local(path)
    monkeypatch.setattr(local, "LOCAL_SYSTEMS", set())
    plain = open_local(path)
    assert type(mapped) is MappedFile and type(plain) is PlainFile
    size = path.stat().st_size
    for offset, length in [(0, 10), (700, 5000), (size - 10, 50), (size + 5, 9), (0, size)]:
        assert bytes(mapped.read(offset, length)) == bytes(plain.read(offset, length))
    assert as_read(Shards.open([folder])) == as_read(
        pickle.loads(pickle.dumps(Shards.open(folder)))
    )


def test_what_is_mapped_is_let_go(tmp_path, monkeypatch):
    """Else a worker's resident size grows to that of the data."""
    size = 40_000_000
    (tmp_path / "x").write_bytes(np.random.default_rng(0).bytes(size))
    monkeypatch.setattr(local._budget, "left", 4_000_000)
    monkeypatch.setattr(local, "MAPPED_LIMIT", 4_000_000)
    file, before, most = open_local(tmp_path / "x"), resident(), 0
    for offset in range(0, size, 100_000):
        assert sum(bytes(file.read(offset, 100_000))[::4096]) > 0
        most = max(most, resident() - before)
    assert most < 16_000_000


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_a_file_cut_short_while_mapped_raises(tmp_path):
    (tmp_path / "x").write_bytes(bytes(100_000))
    file = open_local(tmp_path / "x")
    os.truncate(tmp_path / "x", 5000)
    assert len(file.read(0, 100_000)) == 5000
    assert len(file.read(90_000, 10)) == 0


def test_the_configuration_says_how_remote_shards_are_read(tmp_path):
    config = DataConfig(
        shards=["https://host/{0..9}.tar"],
        seq_len=64,
        remote={"cache_dir": str(tmp_path), "cache_bytes": 5, "timeout_s": 2, "attempts": 7},
    )
    patience = Patience(attempts=7, timeout=2.0)
    assert config.remote.storage == Storage(str(tmp_path), 5, patience=patience)
    assert DataConfig(shards=["a.tar"], seq_len=64).remote.storage == Storage()
