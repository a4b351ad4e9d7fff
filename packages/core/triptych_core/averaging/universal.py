"""A universal checkpoint of DeepSpeed as an input: one fp32.pt a parameter."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from triptych_core.averaging.experts import expert_by_expert, is_stack, stack_shape
from triptych_core.averaging.hf_folder import open_hf_folder, read_json, step_of
from triptych_core.averaging.stored import Source, Stored
from triptych_core.averaging.torch_file import read_torch_file

_HEAD = "lm_head.weight"


def is_universal(path: Path) -> bool:
    """Whether a folder is what ds_to_universal writes."""
    return (path / "zero").is_dir()


def open_universal(path: Path, like: Path | None) -> Source:
    """Tables of the fp32 masters, those of experts included.

    From ZeRO-3 the files hold flat tensors: their shapes are those of `like`, as are the names.

    Raises:
        ValueError: `like` is missing, or its tensors are not those of the checkpoint.
    """
    if like is None:
        raise ValueError(
            f"{path}: must come with a Hugging Face directory of the same model, got none; name it "
            "with --like"
        )
    known = open_hf_folder(like).tensors
    found = {folder.parent.name: folder for folder in sorted((path / "zero").glob("*/fp32.pt"))}
    tensors: dict[str, Stored] = {}
    for name, file in found.items():
        tensors |= _tensors(file, name, known)
    if _is_tied(like):
        # DeepSpeed 0.19.8 writes the table once more under the head's name, from the weights.
        tensors = {name: each for name, each in tensors.items() if not name.endswith(_HEAD)}
    if tensors.keys() != known.keys():
        raise ValueError(
            f"{path}: must hold the parameters of {like}, got without "
            f"{sorted(known.keys() - tensors.keys())[:5]} and with "
            f"{sorted(tensors.keys() - known.keys())[:5]}; name the model's own directory"
        )
    in_order = {name: tensors[name] for name in known}
    return Source(path, "universal checkpoint", in_order, step_of(path), like)


def _is_tied(like: Path) -> bool:
    config = read_json(like / "config.json")
    return bool((config.get("text_config") or config).get("tie_word_embeddings"))


def _tensors(file: Path, name: str, known: dict[str, Stored]) -> dict[str, Stored]:
    """A parameter under the names of the directory, of which stacked experts have many."""
    rest = name
    while rest:
        if rest in known:
            return {rest: _shaped(file, rest, known[rest].shape)}
        if is_stack(rest) and (shape := stack_shape(rest, known)):
            return dict(expert_by_expert(rest, _shaped(file, rest, shape)))
        rest = rest.partition(".")[2]  # what wrappers put before it
    return {name: Stored(torch.float32, (), ())}


def _shaped(file: Path, name: str, shape: tuple[int, ...]) -> Stored:
    content = read_torch_file(file)
    stored = content.get("param", content.get(""))
    if stored is None or stored.size != math.prod(shape):
        raise ValueError(
            f"{file}: must hold the {math.prod(shape)} elements of {name}, got "
            f"{'none' if stored is None else stored.size}; convert the checkpoint again"
        )
    return Stored(stored.dtype, shape, stored.places)
