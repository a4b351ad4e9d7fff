import os
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from triptych_data.workers.transport import LoadError, memory_file, receive, send


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def through(pair, value, descriptors=()):
    sender = threading.Thread(target=send, args=(pair[0], value, descriptors))
    sender.start()
    received = receive(pair[1])
    sender.join()
    return received


def test_values_arrive_equal_and_writable(pair):
    value = {
        "big": torch.arange(100_000).reshape(10, -1),
        "odd": torch.arange(60_000, dtype=torch.int16).reshape(200, 300).t(),
        "small": torch.tensor([1, 2], dtype=torch.int32),
        "none": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5),
        "bytes": torch.arange(9999, dtype=torch.uint8),
        "array": np.random.default_rng(0).random((70, 90)),
        "rest": ["ü", 3, None, b"x" * 10_000],
    }
    got, descriptors = through(pair, value)
    assert descriptors == [] and got.keys() == value.keys() and got["rest"] == value["rest"]
    np.testing.assert_array_equal(got["array"], value["array"])
    for name in ("big", "odd", "small", "none", "scalar", "bytes"):
        assert got[name].dtype == value[name].dtype
        assert torch.equal(got[name], value[name])
        got[name] += 1
    assert torch.equal(value["big"], torch.arange(100_000).reshape(10, -1))  # a copy


def test_arrays_begin_at_cache_lines(pair):
    got, _ = through(pair, [torch.zeros(n, dtype=torch.uint8) for n in (5001, 7003, 4099)])
    assert all(tensor.data_ptr() % 64 == 0 for tensor in got)


def test_open_files_travel_along(pair):
    file = memory_file()
    os.write(file, b"hello")
    for value in ("small", torch.zeros(100_000)):
        _, (copy,) = through(pair, value, (file,))
        assert os.pread(copy, 10, 0) == b"hello"
        os.close(copy)
    os.close(file)


def test_nothing_stays_open_or_mapped(pair):
    def count():
        maps = Path("/proc/self/maps").read_text().count("memfd:triptych")
        return len(list(Path("/proc/self/fd").iterdir())), maps

    through(pair, torch.zeros(100_000))
    before = count()
    kept = [through(pair, torch.zeros(100_000))[0] for _ in range(20)]
    assert count() == (before[0] + 20, before[1] + 20)
    kept.clear()
    assert count() == before


def test_the_other_sides_end_is_an_eof(pair):
    send(pair[0], "last")
    pair[0].close()
    assert receive(pair[1])[0] == "last"
    with pytest.raises(EOFError):
        receive(pair[1])


class Unloadable:
    def __reduce__(self):
        return _refuse, ("no such shard",)


def _refuse(message):
    raise ValueError(message)


def test_what_cannot_be_loaded_leaves_the_connection_usable(pair):
    send(pair[0], Unloadable())
    send(pair[0], "next")
    with pytest.raises(LoadError) as error:
        receive(pair[1])
    assert str(error.value.__cause__) == "no such shard"
    assert receive(pair[1])[0] == "next"
