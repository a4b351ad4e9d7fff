"""Write safetensors shards as a stream: laid out first, then one tensor after the other.

The format is that of safetensors: eight bytes with the length of a JSON header, the header, the
data without a hole. Its library takes all tensors of a file at once.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
SIZES = {"F32": 4, "BF16": 2, "F16": 2}


class Slot(NamedTuple):
    """A tensor to be written, of one of the dtypes in SIZES."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Of its data."""
        return torch.Size(self.shape).numel() * SIZES[self.dtype]


def lay_out(slots: Iterable[Slot], max_shard_bytes: int) -> list[list[Slot]]:
    """Cut tensors into files of at most max_shard_bytes, or one tensor, in their order."""
    shards: list[list[Slot]] = []
    held = 0
    for slot in slots:
        if not shards or held + slot.num_bytes > max_shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(slot)
        held += slot.num_bytes
    return shards


def write_shards(folder: Path, shards: Sequence[Sequence[Slot]], data: Iterator[Tensor]) -> None:
    """Write the files of a Hugging Face checkpoint, and their index if there are several.

    data gives pieces of each slot's tensor, in order: as many rows at a time as its maker likes.
    """
    names = [_file_name(number, len(shards)) for number in range(len(shards))]
    for name, slots in zip(names, shards, strict=True):
        with (folder / name).open("wb") as file:
            header = _header(slots)
            file.write(len(header).to_bytes(8, "little") + header)
            for slot in slots:
                missing = slot.num_bytes
                while missing:
                    piece = next(data)
                    assert _DTYPES[piece.dtype] == slot.dtype, f"{slot.name}: got {piece.dtype}"
                    missing -= file.write(piece.contiguous().view(torch.uint8).numpy().data)
                    assert missing >= 0, f"{slot.name}: more came than {slot.num_bytes} bytes"
            file.flush()
            os.fsync(file.fileno())
    if len(shards) > 1:
        weight_map = {
            slot.name: name for name, slots in zip(names, shards, strict=True) for slot in slots
        }
        total = sum(slot.num_bytes for slots in shards for slot in slots)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _file_name(number: int, count: int) -> str:
    if count == 1:
        return "model.safetensors"
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _header(slots: Sequence[Slot]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    at = 0
    for slot in slots:
        ends = [at, at := at + slot.num_bytes]
        entries[slot.name] = {"dtype": slot.dtype, "shape": slot.shape, "data_offsets": ends}
    text = json.dumps(entries).encode()
    return text + b" " * (-len(text) % 8)
