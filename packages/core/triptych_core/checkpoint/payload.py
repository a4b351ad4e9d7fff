"""Payloads of a checkpoint: safetensors files, written as a stream and read by the stretch.

A tensor in them is a stretch of a flat one, `<parameter>|<kind>|<begin>`. The format is that of
safetensors: eight bytes with the length of a JSON header, the header, the data without a hole.
Written here and not by its library, which would copy all tensors to the host before the first byte
is on disk; read by its library.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from triptych_core.checkpoint.manifest import synced_file

# Kinds of stretches beside those of optimizer states, which have the states' names.
MASTER, FROZEN, BUFFER = "master", "frozen", "buffer"

# Bytes that are on the host at a time: as fast as larger ones, and the disk starts early.
_CHUNK = 1 << 25

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_TYPES = {text: dtype for dtype, text in _DTYPES.items()}

Scalars = dict[str, dict[str, float]]  # name of a parameter -> key of its state -> value


@dataclass(frozen=True, eq=False)
class Stretch:
    """Elements of a parameter, state or buffer from `begin` on: a view (n,) of where they are."""

    name: str
    kind: str
    begin: int
    tensor: Tensor

    @property
    def key(self) -> str:
        """Its name in a payload."""
        return f"{self.name}|{self.kind}|{self.begin}"

    @property
    def num_bytes(self) -> int:
        """Of the data alone."""
        return self.tensor.numel() * self.tensor.element_size()

    def narrow(self, begin: int, end: int) -> Stretch:
        """The part of it from element begin to end of its own."""
        return Stretch(self.name, self.kind, self.begin + begin, self.tensor[begin:end])


def write_payload(path: Path, stretches: Sequence[Stretch], scalars: Scalars) -> dict[str, Any]:
    """Write a payload and sync it; returns its `bytes` and `sha256`.

    Tensors on a device come to the host chunk by chunk.

    Raises:
        ValueError: it could not be written.
    """
    # Widest elements first: each then begins at a multiple of its own size. Then by name: the same
    # state makes the same file, also after a resume, which makes states in another order.
    stretches = sorted(stretches, key=lambda s: (-s.tensor.element_size(), s.key))
    digest, size = hashlib.sha256(), 0
    with synced_file(path) as file:
        for chunk in _chunks(stretches, scalars):
            digest.update(chunk)
            size += file.write(chunk)
    return {"bytes": size, "sha256": digest.hexdigest()}


class Payloads:
    """All that the payloads of a checkpoint hold, whoever wrote it.

    Args:
        paths: the payloads.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self.scalars: Scalars = {}
        self._found: dict[str, dict[str, list[tuple[int, int, Any]]]] = {}
        for path in paths:
            # Opened by the library for as long as one of its slices is alive.
            file = safe_open(path, "pt")
            self.scalars |= json.loads(file.metadata()["scalars"])
            for key in file.keys():  # noqa: SIM118, it is no mapping
                name, kind, begin = key.rsplit("|", 2)
                part = file.get_slice(key)
                end = int(begin) + part.get_shape()[0]
                kinds = self._found.setdefault(name, {})
                kinds.setdefault(kind, []).append((int(begin), end, part))
        for kinds in self._found.values():
            for stretches in kinds.values():
                stretches.sort(key=lambda stretch: stretch[:2])

    def kinds(self, name: str) -> dict[str, torch.dtype]:
        """The kinds there are of a parameter, with their dtypes."""
        return {
            kind: _TYPES[stretches[0][2].get_dtype()]
            for kind, stretches in self._found.get(name, {}).items()
        }

    def fill(self, target: Stretch) -> None:
        """Copy what belongs there into a stretch's view; only those bytes are read.

        Raises:
            ValueError: no payload has some of its elements.
        """
        at, end = target.begin, target.begin + target.tensor.numel()
        for begin, its_end, part in self._found.get(target.name, {}).get(target.kind, ()):
            left, right = max(at, begin), min(end, its_end)
            if left == at and left < right:
                to = target.tensor[left - target.begin : right - target.begin]
                to.copy_(part[left - begin : right - begin])
                at = right
        if at < end:
            raise ValueError(
                f"{target.name}: {target.kind} must be whole in the checkpoint, got none of "
                f"elements {at} to {end}; take another checkpoint"
            )


def _chunks(stretches: Sequence[Stretch], scalars: Scalars) -> Iterable[bytes | memoryview]:
    header: dict[str, Any] = {"__metadata__": {"scalars": json.dumps(scalars, sort_keys=True)}}
    at = 0
    for stretch in stretches:
        header[stretch.key] = {
            "dtype": _DTYPES[stretch.tensor.dtype],
            "shape": [stretch.tensor.numel()],
            "data_offsets": [at, at := at + stretch.num_bytes],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for stretch in stretches:
        flat = stretch.tensor.detach()
        for part in flat.split(max(1, _CHUNK // flat.element_size())):
            yield part.cpu().contiguous().view(torch.uint8).numpy().data
