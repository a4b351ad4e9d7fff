"""Values between processes: small ones through a socket, others in a memory file without a name.

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

_HEADER = struct.Struct("<QQ")  # bytes of the value itself, or pieces in the memory file
_ALIGNMENT = 64  # of each array: a cache line, and enough for every vector unit
_INLINE_BYTES = 4096  # smaller arrays, and messages, do without a page of their own
_MAX_DESCRIPTORS = 8


class LoadError(Exception):
    """A value arrived whole but cannot be made again in this process; the cause says why."""


def send(connection: socket.socket, value: Any, descriptors: Sequence[int] = ()) -> None:
    """Send a value, arrays and CPU tensors in it without pickling them, and open files with it.

    Does not wait for the other side to read, unless it is behind by some hundred messages.
    Raises OSError when nobody listens any more.
    """
    arrays: list[memoryview] = []
    head = io.BytesIO()
    _Pickler(head, arrays).dump(value)
    if arrays or head.tell() > _INLINE_BYTES:
        pieces = [head.getbuffer(), *arrays]
        file = _fill(pieces)
        try:
            socket.send_fds(connection, [_HEADER.pack(0, len(pieces))], [*descriptors, file])
        finally:
            os.close(file)
    else:
        socket.send_fds(connection, [_HEADER.pack(head.tell(), 0)], descriptors)
        connection.sendall(head.getbuffer())


def receive(connection: socket.socket) -> tuple[Any, list[int]]:
    """Return the next value and the descriptors sent with it; its arrays may be written to.

    Raises EOFError when the other side is gone, TimeoutError by the connection's own timeout,
    LoadError for a value that cannot be unpickled here; the connection stays usable then.
    """
    header, files, _, _ = socket.recv_fds(
        connection, _HEADER.size, _MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
    )
    header += _read(connection, _HEADER.size - len(header))
    head_bytes, num_pieces = _HEADER.unpack(header)
    if num_pieces:
        *files, file = files
        head, *buffers = _map(file, num_pieces)
        os.close(file)
    else:
        head, buffers = memoryview(_read(connection, head_bytes)), []
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


def _fill(pieces: Sequence[memoryview]) -> int:
    """Return a memory file with a table of sizes, and then the pieces."""
    sizes = [piece.nbytes for piece in pieces]
    table = memoryview(struct.pack(f"<{len(sizes)}Q", *sizes))
    starts = _starts([table.nbytes, *sizes])
    file = memory_file()
    for piece, start in zip([table, *pieces], starts, strict=False):
        written = 0
        while written < piece.nbytes:  # one call writes at most 2 GiB
            written += os.pwrite(file, piece[written:], start + written)
    os.ftruncate(file, starts[-1])
    return file


def _map(file: int, num_pieces: int) -> list[memoryview]:
    memory = memoryview(mmap.mmap(file, 0))
    sizes = struct.unpack_from(f"<{num_pieces}Q", memory)
    starts = _starts([8 * num_pieces, *sizes])
    return [memory[at : at + size] for at, size in zip(starts[1:], sizes, strict=False)]


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
