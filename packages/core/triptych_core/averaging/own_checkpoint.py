"""A checkpoint of a run as an input, whatever ZeRO stage and number of ranks wrote it."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from triptych_core.averaging.experts import APART, expert_by_expert, in_directory, is_stack
from triptych_core.averaging.hf_folder import is_hf_folder, open_hf_folder, read_json
from triptych_core.averaging.safetensors_file import read_header
from triptych_core.averaging.stored import Place, Source, Stored
from triptych_core.checkpoint.manifest import FILE, find_damage, find_loss, read_manifest
from triptych_core.checkpoint.payload import BUFFER, FROZEN, MASTER
from triptych_core.config import read_tree
from triptych_core.optim.ema import AVERAGE

# Families of triptych-models hold the transformers model as `hf`; exports are named from inside it.
_PREFIX = "hf."


Pieces = dict[str, list[tuple[Place, Any]]]  # of tensors, by name


def is_own_checkpoint(path: Path) -> bool:
    """Whether a folder is one, whole or not."""
    return (path / FILE).is_file() or (path / "state.json").is_file()


def open_own_checkpoint(path: Path, like: Path | None = None, check: bool = False) -> Source:
    """Tables of fp32 masters, frozen parameters and buffers, by the names that an export has.

    Of a run that keeps averages of its weights (`optim.ema_decay`), those and not the masters: an
    export is of them, too.

    Args:
        path: of the checkpoint.
        like: a Hugging Face directory of the model; the run's own export or `model.path` if None.
        check: read all files and compare their SHA-256.

    Raises:
        ValueError: the checkpoint is damaged, or an element of a tensor is in none of its files.
    """
    damage = find_damage(path) if check else find_loss(path)
    if damage is not None:
        raise ValueError(f"{damage}; a checkpoint must be whole to be averaged, take another")
    state = read_json(path / "state.json")
    cut = state.get("parallel.tensor", 1)
    if cut != 1:
        raise ValueError(
            f"{path}: must be of a run with parallel.tensor=1, got {cut}: there weights are stored "
            "as they are cut; average the exports of such runs"
        )
    shapes = _shapes(state)
    averages: Pieces = defaultdict(list)
    pieces: Pieces = defaultdict(list)
    for file in sorted(read_manifest(path)):
        if file.startswith("rank-"):
            _collect(path / file, pieces, averages)
    pieces |= averages
    prefix = _PREFIX if all(name.startswith(_PREFIX) for name in pieces) else ""
    tensors = {
        name.removeprefix(prefix): _joined(path, name, pieces.get(name, []), shape)
        for name, shape in shapes.items()
    }
    small_files = like or _model_folder(path)
    tensors = _as_exported(tensors, small_files)
    facts = {key: state.get(key) for key in ("zero_stage", "world_size", "precision")}
    facts["weights"] = "their moving averages" if averages else "of the step"
    return Source(path, "checkpoint of a run", tensors, int(state["step"]), small_files, facts)


def _as_exported(tensors: dict[str, Stored], like: Path | None) -> dict[str, Stored]:
    """With stacked experts as exports of the model have them: for most, expert by expert.

    Those of Qwen3-VL-MoE stay stacked under the names of transformers 5, which it loads as well,
    and so do all where `like` has them so.
    """
    if like is None:
        return tensors
    known = open_hf_folder(like).tensors if is_hf_folder(like) else {}
    names = APART.get(read_json(like / "config.json").get("model_type", ""))
    if names is None or any(is_stack(name) for name in known):
        return tensors
    found: dict[str, Stored] = {}
    for name, stored in tensors.items():
        if is_stack(name):
            found |= expert_by_expert(name, stored, names)
        else:
            found[in_directory(name, names)] = stored
    return found


def _shapes(state: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of parameters and buffers, which a checkpoint keeps as text."""
    kinds = ("trainable_parameters", "frozen_parameters", "buffers")
    texts = {name: text for kind in kinds for name, text in state[kind].items()}
    return {
        name: tuple(int(size) for size in text.strip("()").split(",") if size.strip())
        for name, text in texts.items()
    }


def _collect(file: Path, pieces: Pieces, averages: Pieces) -> None:
    for key, stored in read_header(file)[0].items():
        name, kind, begin = key.rsplit("|", 2)
        if kind in (MASTER, FROZEN, BUFFER, AVERAGE):
            first = int(begin)
            place = Place(first, first + stored.size, file, stored.places[0].offset)
            found = averages if kind == AVERAGE else pieces
            found[name].append((place, stored.dtype))


def _joined(
    path: Path, name: str, pieces: list[tuple[Place, Any]], shape: tuple[int, ...]
) -> Stored:
    """One tensor of its pieces; where ranks hold the same elements the first one's are read."""
    places, at = [], 0
    for place, _ in sorted(pieces, key=lambda piece: piece[0][:2]):
        if place.begin <= at < place.end or (place.begin == at == place.end):
            skip = at - place.begin
            offset = place.offset + skip * pieces[0][1].itemsize
            places.append(Place(at, place.end, place.file, offset))
            at = place.end
    if at != math.prod(shape) or len({dtype for _, dtype in pieces}) != 1:
        raise ValueError(
            f"{path}: {name} must be whole and of one dtype, got elements up to {at} of {shape}; "
            "take another checkpoint"
        )
    return Stored(pieces[0][1], shape, tuple(places))


def _model_folder(path: Path) -> Path | None:
    """Where the run that wrote a checkpoint had its config and tokenizer from."""
    run_dir = path.resolve().parent.parent
    if (run_dir / "export/config.json").is_file():
        return run_dir / "export"
    if (run_dir / "config.yaml").is_file():
        section = read_tree(run_dir / "config.yaml").get("model")
        named = section.get("path") if isinstance(section, dict) else None
        if isinstance(named, str) and (Path(named) / "config.json").is_file():
            return Path(named)
    return None
