"""A copy in host memory of what a rank saves, so that training can go on while it is written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from triptych_core.checkpoint.payload import Stretch

# A power of two: torch rounds what it pins up to one.
_BLOCK = 1 << 28


class HostCopy:
    """Room for stretches in blocks of pinned memory, which later copies use again."""

    def __init__(self, block_bytes: int = _BLOCK) -> None:
        self._block_bytes = block_bytes
        self._blocks: list[Tensor] = []

    @torch.no_grad()
    def take(self, stretches: Iterable[Stretch]) -> list[Stretch]:
        """The same stretches with their present values, in host memory until the next call.

        One that does not fit into the rest of a block is cut there.
        """
        # Widest elements first: each then begins at a multiple of its own size.
        placed = list(self._place(sorted(stretches, key=lambda s: -s.tensor.element_size())))
        for source, target in placed:
            target.tensor.copy_(source.tensor, non_blocking=True)
        get_accelerator().synchronize()
        return [target for _, target in placed]

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


def _pinned(size: int) -> Tensor:
    pins = get_accelerator().device_name() != "cpu"
    return torch.empty(size, dtype=torch.uint8, pin_memory=pins)
