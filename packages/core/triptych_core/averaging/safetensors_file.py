"""The header of a safetensors file, checked against the file before anything is trusted."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from triptych_core.averaging.stored import SAFETENSORS_DTYPES, Place, Stored

_MOST = 100_000_000  # bytes of a header, the library's own limit


def read_header(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Tensors of a safetensors file, and its metadata.

    Raises:
        ValueError: the file is cut off, damaged, or holds a dtype that is unknown here.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MOST):
            raise _broken(path, f"{size} bytes with a header of {length}")
        text = file.read(length)
    try:
        header = dict(json.loads(text))
        metadata = dict(header.pop("__metadata__", {}))
        begin = 8 + length
        tensors = {name: _stored(path, name, entry, begin) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if str(error).startswith(f"{path}: "):
            raise
        raise _broken(path, f"a header that cannot be read ({error})") from None
    end = max([begin, *(s.places[0].offset + s.num_bytes for s in tensors.values())])
    if end != size:
        raise _broken(path, f"{size} bytes where its header says {end}")
    return tensors, metadata


def _stored(path: Path, name: str, entry: dict[str, Any], begin: int) -> Stored:
    if entry["dtype"] not in SAFETENSORS_DTYPES:
        raise ValueError(
            f"{path}: {name} must have a dtype of {', '.join(SAFETENSORS_DTYPES)}, got "
            f"{entry['dtype']}; convert the model first"
        )
    first, last = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if any(not isinstance(size, int) or size < 0 for size in (first, *shape)):
        raise _broken(path, f"shape {list(shape)} from byte {first} for {name}")
    stored = Stored(
        SAFETENSORS_DTYPES[entry["dtype"]],
        shape,
        (Place(0, math.prod(shape), path, begin + first),),
    )
    if stored.num_bytes != last - first:
        raise _broken(path, f"{last - first} bytes for {name} of shape {list(shape)}")
    return stored


def _broken(path: Path, found: str) -> ValueError:
    return ValueError(
        f"{path}: must be a whole safetensors file, got {found}; copy or download it again"
    )
