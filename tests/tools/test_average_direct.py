"""Reading and writing past the page cache: the same bytes, from and to any place."""

from __future__ import annotations

import errno
import fcntl
import os
import random
from pathlib import Path

import pytest
import torch

from tests.tools.average_folders import average, weights, write_folder
from triptych_core.averaging.direct import (
    PAGE,
    Pages,
    _take_cache,
    is_cached,
    open_past_cache,
    read_pages,
    write_pages,
)


def forget(path: Path) -> None:
    """Put a file out of the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(random.Random(0).randbytes(5 * PAGE + 123))
    return path


def test_any_place_is_read(file):
    data, choose = file.read_bytes(), random.Random(1)
    forget(file)
    descriptor = open_past_cache(file, os.O_RDONLY)
    for _ in range(300):
        offset = choose.randrange(len(data))
        count = choose.randrange(1, 3 * PAGE)
        found = read_pages(descriptor, offset, count, Pages(count + 2 * PAGE))
        assert found.numpy().tobytes() == data[offset : offset + count], (offset, count)
    assert read_pages(descriptor, len(data) + 5, 7, Pages(3 * PAGE)).numel() == 0
    os.close(descriptor)


def test_whole_pages_are_written(tmp_path):
    data = random.Random(2).randbytes(3 * PAGE + 5)
    descriptor = open_past_cache(tmp_path / "out", os.O_RDWR | os.O_CREAT)
    pages = Pages(2 * PAGE)
    for begin in (2 * PAGE, 0):
        part = data[begin : begin + 2 * PAGE]
        pages.view[: len(part)] = part
        write_pages(descriptor, begin, len(part), pages)
    os.truncate(descriptor, len(data))
    os.close(descriptor)
    assert (tmp_path / "out").read_bytes() == data


def test_a_file_in_the_cache_is_known(file):
    file.read_bytes()
    assert is_cached(file)
    forget(file)
    if os.statvfs(file).f_bsize == PAGE and is_cached(file):
        pytest.skip("this file system keeps its files in memory")
    assert not is_cached(file)
    file.write_bytes(b"")
    assert is_cached(file)


def test_a_file_system_that_refuses_is_used_with_its_cache(file):
    descriptor = open_past_cache(file, os.O_RDONLY)
    refusal = OSError(errno.EINVAL, "refused")
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
        _take_cache(descriptor, refusal)
    assert not fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT
    found = read_pages(descriptor, 7, 100, Pages(3 * PAGE))
    assert found.numpy().tobytes() == file.read_bytes()[7:107]
    with pytest.raises(OSError, match="refused"):
        _take_cache(descriptor, refusal)
    os.close(descriptor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_averages_do_not_depend_on_the_cache(tmp_path, dtype):
    paths = [write_folder(tmp_path / f"model-{n}", weights(n, dtype)) for n in range(3)]
    outputs = []
    for name, odd in (("cached", 0), ("forgotten", 0), ("odd", 3)):
        for path in paths:
            file = path / "model.safetensors"
            if odd:  # a header whose length is no multiple of an element's
                data = file.read_bytes()
                length = int.from_bytes(data[:8], "little")
                longer = (length + odd).to_bytes(8, "little")
                file.write_bytes(longer + data[8 : 8 + length] + b" " * odd + data[8 + length :])
            if name != "cached":
                forget(file)
        average(tmp_path / name, *paths)
        outputs.append((tmp_path / name / "model.safetensors").read_bytes())
    assert outputs[0] == outputs[1] == outputs[2]
