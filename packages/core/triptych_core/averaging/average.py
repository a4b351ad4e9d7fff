"""Runs a plan: threads read stretches of inputs and write those of the output where they belong."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait

import torch

from triptych_core.averaging.layout import Shard, Slot
from triptych_core.averaging.plan import Memory, Plan
from triptych_core.averaging.stored import Reader
from triptych_core.averaging.stretch import Terms, make_stretch, terms_of
from triptych_core.averaging.unfinished import Unfinished

Progress = Callable[[int], None]  # told how many bytes more of the output there are


def write_shards(
    plan: Plan, memory: Memory, folder: Unfinished, progress: Progress = lambda _: None
) -> None:
    """Write all shards that are not there yet; a shard counts once it is on the disk.

    Raises:
        ValueError: an input ends too early, or a result is not finite.
        OSError: the disk is full or fails.
    """
    threads_before = torch.get_num_threads()
    torch.set_num_threads(1)  # teams of OpenMP would fight with these threads over the cores
    try:
        with Reader() as reader:
            reader.open(plan.sources)
            _run_threads(_Work(plan, memory, folder, reader, progress), memory.threads)
    finally:
        torch.set_num_threads(threads_before)


def _run_threads(work: _Work, threads: int) -> None:
    with ThreadPoolExecutor(threads, "average") as pool:
        futures = [pool.submit(work.run) for _ in range(threads)]
        try:
            wait(futures)
        except BaseException:  # Ctrl-C: what is begun is finished, nothing more is begun
            work.stopped = True
            raise
    for future in futures:
        future.result()


class _OpenShard:
    """A shard that is being written."""

    def __init__(self, shard: Shard, folder: Unfinished) -> None:
        self.shard = shard
        self.left = len(shard.header) + sum(slot.num_bytes for slot in shard.slots)
        self.descriptor = os.open(folder.path / shard.file, os.O_RDWR | os.O_CREAT, 0o644)
        os.truncate(self.descriptor, shard.num_bytes)
        write_all(self.descriptor, memoryview(shard.header), 0)
        self.left -= len(shard.header)


class _Tensor:
    """An output tensor, whose terms the first thread that needs them finds out."""

    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        self._lock = threading.Lock()
        self._terms: Terms | None = None

    def terms(self, plan: Plan, reader: Reader) -> Terms:
        with self._lock:
            if self._terms is None:
                self._terms = terms_of(plan, self.slot.name, reader)
            return self._terms


class _Work:
    """Stretches in the order of the output; every thread takes the next one."""

    def __init__(
        self, plan: Plan, memory: Memory, folder: Unfinished, reader: Reader, progress: Progress
    ) -> None:
        self.stopped = False
        self._plan, self._memory, self._folder = plan, memory, folder
        self._reader, self._progress = reader, progress
        self._lock = threading.Lock()
        self._stretches = self._all_stretches()

    def run(self) -> None:
        """What a thread does."""
        room = self._memory.room()
        try:
            while (stretch := self._next()) is not None:
                shard, tensor, begin, end = stretch
                slot = tensor.slot
                terms = tensor.terms(self._plan, self._reader)
                made = make_stretch(self._plan, slot, terms, begin, end, self._reader, room)
                data = made.view(torch.uint8).numpy().data
                write_all(shard.descriptor, data, slot.offset + begin * slot.dtype.itemsize)
                self._finish(shard, len(data))
        except BaseException:
            self.stopped = True
            raise

    def _next(self) -> tuple[_OpenShard, _Tensor, int, int] | None:
        with self._lock:
            return None if self.stopped else next(self._stretches, None)

    def _all_stretches(self) -> Iterator[tuple[_OpenShard, _Tensor, int, int]]:
        for shard in self._plan.shards:
            if shard.file in self._folder.done:
                self._progress(shard.num_bytes)
                continue
            opened = _OpenShard(shard, self._folder)
            if opened.left == 0:  # tensors without elements alone
                self._close(opened)
            for slot in shard.slots:
                size = slot.num_bytes // slot.dtype.itemsize
                tensor = _Tensor(slot)
                for begin in range(0, size, self._memory.elements):
                    yield opened, tensor, begin, min(begin + self._memory.elements, size)

    def _finish(self, shard: _OpenShard, count: int) -> None:
        with self._lock:
            shard.left -= count
            self._progress(count)
            is_whole = shard.left == 0
        if is_whole:
            self._close(shard)

    def _close(self, shard: _OpenShard) -> None:
        os.fsync(shard.descriptor)
        os.close(shard.descriptor)
        self._folder.mark_done(shard.shard.file)


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """Write at a place; a single call may write less than it was given."""
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count
