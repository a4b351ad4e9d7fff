"""Runs a plan: threads fill stretches of the output's files from the same elements of inputs."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import NamedTuple

import torch

from triptych_core.averaging.combine import Room
from triptych_core.averaging.direct import Pages, open_past_cache, write_pages
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
        with Reader(past_cache=plan.reads_once) as reader:
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


class _OpenShard:
    """A shard that is being written."""

    def __init__(self, shard: Shard, folder: Unfinished) -> None:
        self.shard, self.left = shard, shard.num_bytes
        path = folder.path / shard.file
        self.descriptor = open_past_cache(path, os.O_RDWR | os.O_CREAT)
        os.truncate(self.descriptor, shard.num_bytes)


class _Stretch(NamedTuple):
    """Bytes of a file, and the tensors that have some of them."""

    file: _OpenShard
    begin: int
    end: int
    tensors: list[_Tensor]


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
        room, pages = self._memory.room(), Pages(self._memory.stretch_bytes)
        try:
            while (stretch := self._next()) is not None:
                self._fill(stretch, room, pages)
                count = stretch.end - stretch.begin
                write_pages(stretch.file.descriptor, stretch.begin, count, pages)
                self._finish(stretch.file, count)
        except BaseException:
            self.stopped = True
            raise

    def _fill(self, stretch: _Stretch, room: Room, pages: Pages) -> None:
        """Header and tensors of a stretch, each where it belongs in the pages."""
        begin, end = stretch.begin, stretch.end
        header = stretch.file.shard.header[begin:end]
        pages.view[: len(header)] = header
        for tensor in stretch.tensors:
            slot = tensor.slot
            first, last = max(begin, slot.offset), min(end, slot.offset + slot.num_bytes)
            target = pages.tensor[first - begin : last - begin].view(slot.dtype)
            element = (first - slot.offset) // slot.dtype.itemsize
            terms = tensor.terms(self._plan, self._reader)
            make_stretch(self._plan, slot, terms, element, target, self._reader, room)

    def _next(self) -> _Stretch | None:
        with self._lock:
            return None if self.stopped else next(self._stretches, None)

    def _all_stretches(self) -> Iterator[_Stretch]:
        for shard in self._plan.shards:
            if shard.file in self._folder.done:
                self._progress(shard.num_bytes)
                continue
            opened = _OpenShard(shard, self._folder)
            waiting = [_Tensor(slot) for slot in reversed(shard.slots) if slot.num_bytes]
            held: list[_Tensor] = []
            for begin in range(0, shard.num_bytes, self._memory.stretch_bytes):
                end = min(begin + self._memory.stretch_bytes, shard.num_bytes)
                held = [t for t in held if t.slot.offset + t.slot.num_bytes > begin]
                while waiting and waiting[-1].slot.offset < end:
                    held.append(waiting.pop())
                yield _Stretch(opened, begin, end, list(held))

    def _finish(self, file: _OpenShard, count: int) -> None:
        with self._lock:
            file.left -= count
            self._progress(count)
            is_whole = file.left == 0
        if is_whole:
            os.truncate(file.descriptor, file.shard.num_bytes)  # the last page was written whole
            os.fsync(file.descriptor)
            os.close(file.descriptor)
            self._folder.mark_done(file.shard.file)
