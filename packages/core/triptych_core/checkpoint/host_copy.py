"""A copy in host memory of what a rank saves, so that training can go on while it is written."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from triptych_core.checkpoint.payload import Stretch

# A power of two: torch rounds what it pins up to one.
_BLOCK = 1 << 28


class HostCopy:
    """Room for stretches in blocks of pinned memory, which later copies use again.

    An accelerator copies beside its other work, the next forward and backward: what changes the
    stretches then has to come after `before_change`, what reads the copies after `wait`.
    """

    def __init__(self, block_bytes: int = _BLOCK) -> None:
        self._block_bytes = block_bytes
        self._blocks: list[Tensor] = []
        self._reserving: threading.Thread | None = None
        self._stream: Any = None
        self._copied: Any = None
        self._sources: list[Stretch] = []  # kept, as their memory must not go to others meanwhile

    def reserve(self, num_bytes: int) -> threading.Thread:
        """Begin to pin this much, on a thread of its own: 19 GiB took a save 9 s."""
        missing = -(-num_bytes // self._block_bytes) - len(self._blocks)
        room = (_pinned(self._block_bytes) for _ in range(missing))
        self._reserving = threading.Thread(target=lambda: self._blocks.extend(room), daemon=True)
        self._reserving.start()
        return self._reserving

    @torch.no_grad()
    def take(self, stretches: Iterable[Stretch]) -> list[Stretch]:
        """The same stretches with their present values, in host memory until the next call.

        One that does not fit into the rest of a block is cut there.
        """
        if self._reserving is not None:
            self._reserving.join()
        # Widest elements first: each then begins at a multiple of its own size.
        placed = list(self._place(sorted(stretches, key=lambda s: -s.tensor.element_size())))
        if get_accelerator().device_name() == "cpu":
            _copy(placed)
        else:
            self._copy_beside(placed)
        return [target for _, target in placed]

    def before_change(self, *_: Any) -> None:
        """What the device is given from now on begins after the copy; the host does not wait."""
        if self._copied is not None:
            get_accelerator().current_stream().wait_event(self._copied)

    def wait(self) -> None:
        """Until the copies hold what they should."""
        if self._copied is not None:
            self._copied.synchronize()
            self._sources = []

    def _copy_beside(self, placed: list[tuple[Stretch, Stretch]]) -> None:
        accelerator = get_accelerator()
        self._stream = self._stream or accelerator.Stream()
        self._stream.wait_stream(accelerator.current_stream())
        with accelerator.stream(self._stream):
            _copy(placed)
            self._copied = accelerator.Event()
            self._copied.record(self._stream)
        self._sources = [source for source, _ in placed]

    def _place(self, stretches: Iterable[Stretch]) -> Iterator[tuple[Stretch, Stretch]]:
        """Each stretch, or part of one, with its place."""
        block, at = -1, self._block_bytes
        for stretch in stretches:
            width = stretch.tensor.element_size()
            begin, size = 0, stretch.tensor.numel()
            while begin < size:
                if at + width > self._block_bytes:
                    block, at = block + 1, 0
                    if block == len(self._blocks):
                        self._blocks.append(_pinned(self._block_bytes))
                end = min(size, begin + (self._block_bytes - at) // width)
                part = stretch.narrow(begin, end)
                room = self._blocks[block][at : at + part.num_bytes].view(part.tensor.dtype)
                yield part, Stretch(part.name, part.kind, part.begin, room)
                at, begin = at + part.num_bytes, end


def _copy(placed: Iterable[tuple[Stretch, Stretch]]) -> None:
    for source, target in placed:
        target.tensor.copy_(source.tensor, non_blocking=True)


def _pinned(size: int) -> Tensor:
    """Memory that a device copies into by itself; its pages are there before it is pinned.

    CUDA holds a lock while it pins, and steps wait for it: short once the pages are there.
    """
    name = get_accelerator().device_name()
    if name != "cuda":
        return torch.empty(size, dtype=torch.uint8, pin_memory=name != "cpu")
    room = torch.zeros(size, dtype=torch.uint8)
    runtime = torch.cuda.cudart()
    error = runtime.cudaHostRegister(room.data_ptr(), size, 0)
    if error:  # the limit of locked memory, say: copies then wait, and are right
        return room
    weakref.finalize(room, runtime.cudaHostUnregister, room.data_ptr())
    return room
