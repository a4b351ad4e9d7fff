"""What an input holds, as tables of places in files: nothing is read before it is wanted."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from triptych_core.averaging.direct import Landing, is_cached, open_past_cache, read_pages

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES_OF_DTYPES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
AVERAGED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Place(NamedTuple):
    """Where elements `begin` to `end` of a tensor lie: from byte `offset` of a file on."""

    begin: int
    end: int
    file: Path
    offset: int


class Stored(NamedTuple):
    """A tensor in files; its places are in the order of its elements and leave none out."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    places: tuple[Place, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Of its elements."""
        return self.size * self.dtype.itemsize

    def part(self, begin: int, end: int, shape: tuple[int, ...]) -> Stored:
        """Elements `begin` to `end` as a tensor of their own."""
        places = []
        for place in self.places:
            left, right = max(begin, place.begin), min(end, place.end)
            if left < right:
                offset = place.offset + (left - place.begin) * self.dtype.itemsize
                places.append(Place(left - begin, right - begin, place.file, offset))
        return Stored(self.dtype, shape, tuple(places))


@dataclass(frozen=True)
class Source:
    """An input.

    Args:
        path: as the user named it.
        kind: of input, for people.
        tensors: by the names they have in the output.
        step: of training, if it is known.
        small_files: a folder with config, tokenizer and processor, if there is one.
    """

    path: Path
    kind: str
    tensors: dict[str, Stored]
    step: int | None = None
    small_files: Path | None = None
    facts: dict[str, object] = field(default_factory=dict)

    def files(self) -> list[Path]:
        """All files that hold its tensors, by name."""
        return sorted({place.file for stored in self.tensors.values() for place in stored.places})


class Reader:
    """Reads elements of stored tensors by threads; holds each file open once.

    No memory is mapped: pages of a mapping count as this process's memory once they are touched.

    Args:
        past_cache: read files past the page cache that are not in it; right for reading once.
    """

    def __init__(self, past_cache: bool = False) -> None:
        self._past_cache = past_cache
        self._open: dict[Path, tuple[int, bool]] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor, _past in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def open(self, sources: list[Source]) -> None:
        """Open all files of the inputs, before threads read."""
        for source in sources:
            for file in source.files():
                if file in self._open:
                    continue
                past = self._past_cache and not is_cached(file)
                flags = os.O_RDONLY
                descriptor = open_past_cache(file, flags) if past else os.open(file, flags)
                if not past:
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
                self._open[file] = descriptor, past

    def read(self, stored: Stored, begin: int, end: int, landing: Landing) -> torch.Tensor:
        """Elements `begin` to `end`, in a landing that is large enough; valid until its next use.

        Raises:
            ValueError: a file ends before them.
        """
        width, size = stored.dtype.itemsize, (end - begin) * stored.dtype.itemsize
        for place in stored.places:
            left, right = max(begin, place.begin), min(end, place.end)
            if left >= right:
                continue
            offset = place.offset + (left - place.begin) * width
            part = landing.joined[(left - begin) * width : (right - begin) * width]
            descriptor, past = self._open[place.file]
            if not past:
                _fill(place.file, descriptor, offset, part)
                continue
            landed = read_pages(descriptor, offset, part.numel(), landing.pages)
            _check_all(place.file, landed.numel(), part.numel())
            if part.numel() == size and offset % width == 0:
                return landed.view(stored.dtype)
            part.copy_(landed)
        return landing.joined[:size].view(stored.dtype)


def _fill(file: Path, descriptor: int, offset: int, part: torch.Tensor) -> None:
    memory, done = part.numpy().data, 0
    while done < len(memory):
        count = os.preadv(descriptor, [memory[done:]], offset + done)
        if count == 0:
            break
        done += count
    _check_all(file, done, len(memory))


def _check_all(file: Path, found: int, wanted: int) -> None:
    if found != wanted:
        raise ValueError(
            f"{file}: must not change while it is read, got an end {wanted - found} bytes too early"
            "; average again when nothing writes it"
        )
