"""Values between processes: a small head through a socket, arrays in a memory file without a name.

A memory file lives as long as someone maps it: after a kill nothing is left behind, and no mount
such as /dev/shm limits its size.
"""

import io
import mmap
import os
import pickle
import socket
import struct
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

_HEADER = struct.Struct("<QQ")  # bytes of the head, number of arrays beside it
_ALIGNMENT = 64  # of each array: a cache line, and enough for every vector unit
_INLINE_BYTES = 4096  # smaller arrays travel in the head: a page of their own would cost more
_MAX_DESCRIPTORS = 8


class LoadError(Exception):
    """A value arrived whole but cannot be made again in this process; the cause says why."""


def send(connection: socket.socket, value: Any, descriptors: Sequence[int] = ()) -> None:
    """Send a value, arrays and CPU tensors in it without pickling them, and open files with it.

    Raises OSError when nobody listens any more.
    """
    arrays: list[memoryview] = []
    head = io.BytesIO()
    _Pickler(head, arrays).dump(value)
    header = _HEADER.pack(head.tell(), len(arrays))
    if arrays:
        file = _fill(arrays)
        try:
            socket.send_fds(connection, [header], [*descriptors, file])
        finally:
            os.close(file)
    else:
        socket.send_fds(connection, [header], descriptors)
    sizes = struct.pack(f"<{len(arrays)}Q", *(array.nbytes for array in arrays))
    connection.sendall(sizes + head.getvalue())


def receive(connection: socket.socket) -> tuple[Any, list[int]]:
    """Return the next value and the descriptors sent with it; its arrays may be written to.

    Raises EOFError when the other side is gone, TimeoutError by the connection's own timeout,
    LoadError for a value that cannot be unpickled here; the connection stays usable then.
    """
    header, files, _, _ = socket.recv_fds(
        connection, _HEADER.size, _MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
    )
    header += _read(connection, _HEADER.size - len(header))
    head_bytes, num_arrays = _HEADER.unpack(header)
    sizes = struct.unpack(f"<{num_arrays}Q", _read(connection, 8 * num_arrays))
    head = _read(connection, head_bytes)
    buffers: list[memoryview] = []
    if num_arrays:
        *files, file = files
        starts = _starts(sizes)
        memory = memoryview(mmap.mmap(file, starts[-1]))
        os.close(file)
        buffers = [memory[at : at + size] for at, size in zip(starts, sizes, strict=False)]
    try:
        return pickle.loads(head, buffers=buffers), list(files)
    except Exception as error:
        raise LoadError from error


def memory_file() -> int:
    """Return the descriptor of a new empty file that has no name and lives in memory."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("triptych-data")
    with tempfile.TemporaryFile() as file:  # other systems than Linux: on a disk, but nameless
        return os.dup(file.fileno())


class _Pickler(pickle.Pickler):
    """Pickles tensors as arrays, and leaves the bytes of large arrays to `arrays`."""

    def __init__(self, file: io.BytesIO, arrays: list[memoryview]) -> None:
        def keep(buffer: pickle.PickleBuffer) -> bool:
            data = buffer.raw()
            if data.nbytes < _INLINE_BYTES:
                return True
            arrays.append(data)
            return False

        super().__init__(file, protocol=5, buffer_callback=keep)

    def reducer_override(self, value: Any) -> Any:
        if type(value) is torch.Tensor:
            return _tensor, (np.ascontiguousarray(value.numpy()), value.shape)
        return NotImplemented


def _tensor(array: np.ndarray, shape: torch.Size) -> torch.Tensor:
    return torch.from_numpy(array).reshape(shape)


def _fill(arrays: Sequence[memoryview]) -> int:
    """Return a memory file with the arrays, each at its start."""
    file = memory_file()
    starts = _starts([array.nbytes for array in arrays])
    for array, start in zip(arrays, starts, strict=False):
        written = 0
        while written < array.nbytes:  # one call writes at most 2 GiB
            written += os.pwrite(file, array[written:], start + written)
    os.ftruncate(file, starts[-1])
    return file


def _starts(sizes: Sequence[int]) -> list[int]:
    """Return where each array begins in the file, and the end of the file."""
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
    return starts


def _read(connection: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = connection.recv_into(view)
        if not count:
            raise EOFError("the other process ended")
        view = view[count:]
    return data
