"""A Hugging Face directory as an input: safetensors or .bin, in one file or in shards."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from triptych_core.averaging.safetensors_file import read_header
from triptych_core.averaging.stored import Source, Stored
from triptych_core.averaging.torch_file import read_torch_file

# The first that is there is read, as transformers does it.
WEIGHTS = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)


def is_hf_folder(path: Path) -> bool:
    """Whether there are weights under their usual name."""
    return any((path / name).is_file() for name in WEIGHTS)


def open_hf_folder(path: Path) -> Source:
    """Tables of a Hugging Face directory.

    Raises:
        ValueError: a file is missing, broken or does not hold what the index says; config.json is
            missing.
    """
    if not (path / "config.json").is_file():
        raise ValueError(
            f"{path}: must hold config.json beside its weights, got none; copy the one of the model"
        )
    name = next(name for name in WEIGHTS if (path / name).is_file())
    read = read_torch_file if ".bin" in name else read_safetensors
    tensors = _by_index(path / name, read) if name.endswith(".json") else read(path / name)
    return Source(path, f"HF directory, {name}", _without_aliases(tensors), step_of(path), path)


def read_safetensors(path: Path) -> dict[str, Stored]:
    """Tensors of a safetensors file."""
    return read_header(path)[0]


def step_of(path: Path) -> int | None:
    """Steps of training, from trainer_state.json or a folder's name such as checkpoint-500."""
    state = path / "trainer_state.json"
    if state.is_file():
        return int(read_json(state)["global_step"])
    found = re.search(r"(?:^|[-_])(?:checkpoint|step)s?[-_]?(\d+)$", path.resolve().name)
    return int(found[1]) if found else None


def read_json(path: Path) -> dict[str, Any]:
    """An object in a JSON file.

    Raises:
        ValueError: it is no JSON or no object.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path}: must be a JSON object, got {error}; copy or download it again"
        ) from None


def _by_index(index: Path, read: Callable[[Path], dict[str, Stored]]) -> dict[str, Stored]:
    content = read_json(index)
    if not isinstance(content.get("weight_map"), dict):
        raise ValueError(f"{index}: must have a weight_map, got none; copy or download it again")
    weight_map: dict[str, str] = content["weight_map"]
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(
                f"{index}: must name files of its own folder, got {name!r}; download it again"
            )
    tensors: dict[str, Stored] = {}
    for name in sorted(set(weight_map.values())):
        file = index.parent / name
        if not file.is_file():
            raise ValueError(f"{file}: must be there as {index.name} says, got none; fetch it")
        found = read(file)
        promised = {key for key, its_file in weight_map.items() if its_file == name}
        lacks, more = sorted(promised - found.keys()), sorted(found.keys() - promised)
        if lacks or more:
            raise ValueError(
                f"{file}: must hold the tensors {index.name} says, got without {lacks[:5]} and "
                f"with {more[:5]}; copy or download both again"
            )
        tensors |= found
    return {name: tensors[name] for name in weight_map}


def _without_aliases(tensors: dict[str, Stored]) -> dict[str, Stored]:
    """Without later names of the same bytes: .bin files keep tied weights so, safetensors once."""
    first: dict[tuple[Any, ...], str] = {}
    for name, stored in tensors.items():
        if stored.size:
            first.setdefault((stored.shape, stored.places), name)
    kept = set(first.values())
    return {name: stored for name, stored in tensors.items() if name in kept or not stored.size}
