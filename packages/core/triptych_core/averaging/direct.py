"""Reading and writing past the page cache.

Measured on a virtual disk with busy cores: 3.3 GiB are read in 4 s and not 14, 1 GiB is written in
0.8 s and not 3. What lies in the page cache already is read from there.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from pathlib import Path

import torch

PAGE = 4096  # places in files, lengths and memory must be multiples of it


class Pages:
    """Memory that begins on a page, as a tensor of bytes and for the system's calls."""

    def __init__(self, num_bytes: int) -> None:
        self.view = memoryview(mmap.mmap(-1, up_to_page(num_bytes)))
        self.tensor = torch.frombuffer(self.view, dtype=torch.uint8)


class Landing:
    """Where a thread's reads land: on whole pages, or put together beside them.

    Args:
        num_bytes: of what is read at once, at most.
    """

    def __init__(self, num_bytes: int) -> None:
        self.pages = Pages(num_bytes + 2 * PAGE)  # a page may be cut at both ends
        self.joined = torch.empty(num_bytes, dtype=torch.uint8)

    @staticmethod
    def bytes_of(num_bytes: int) -> int:
        """What it takes."""
        return 2 * num_bytes + 4 * PAGE


def up_to_page(count: int) -> int:
    """The next multiple of a page."""
    return max(1, -(-count // PAGE)) * PAGE


def open_past_cache(path: Path, flags: int) -> int:
    """A descriptor without the page cache, or with it where the file system has no other."""
    try:
        return os.open(path, flags | os.O_DIRECT, 0o644)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o644)


def is_cached(path: Path) -> bool:
    """Whether most of a file lies in the page cache."""
    size = path.stat().st_size
    if size == 0:
        return True
    found = ctypes.create_string_buffer(-(-size // mmap.PAGESIZE))
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as mapped:
        start = ctypes.c_char.from_buffer(mapped)
        address, length = ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size)
        failed = ctypes.CDLL(None).mincore(address, length, found)
        del start  # or the mapping could not be closed
    return not failed and sum(byte & 1 for byte in found.raw[::64]) > 0.9 * len(found.raw[::64])


def read_pages(descriptor: int, offset: int, count: int, pages: Pages) -> torch.Tensor:
    """`count` bytes from any place of a file, fewer where it ends."""
    shift = offset % PAGE
    begin, wanted, got = offset - shift, shift + count, 0
    while got < wanted:
        part = pages.view[got : up_to_page(wanted)]
        try:
            found = os.preadv(descriptor, [part], begin + got)
        except OSError as error:
            _take_cache(descriptor, error)
            continue
        got += found
        if found % PAGE:  # the file's end, unless a signal cut it short
            if got < wanted and os.fstat(descriptor).st_size <= begin + got:
                break
            got = min(got, wanted) if got >= wanted else got - got % PAGE
        elif found == 0:
            break
    return pages.tensor[shift : min(max(got, shift), wanted)]


def write_pages(descriptor: int, offset: int, count: int, pages: Pages) -> None:
    """The first `count` bytes to a multiple of a page; a page that they end in is written whole."""
    done, length = 0, up_to_page(count)
    while done < length:
        try:
            done += os.pwrite(descriptor, pages.view[done:length], offset + done)
        except OSError as error:
            _take_cache(descriptor, error)


def _take_cache(descriptor: int, error: OSError) -> None:
    """Go on through the page cache where the file system refuses to go past it."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    if error.errno != errno.EINVAL or not flags & os.O_DIRECT:
        raise error
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
