"""A universal checkpoint of DeepSpeed as an input: one fp32.pt a parameter."""

from __future__ import annotations

from pathlib import Path

from triptych_core.averaging.hf_folder import open_hf_folder, step_of
from triptych_core.averaging.stored import Source, Stored
from triptych_core.averaging.torch_file import read_torch_file


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
    wanted = open_hf_folder(like).tensors
    found = {folder.parent.name: folder for folder in sorted((path / "zero").glob("*/fp32.pt"))}
    renamed = {_name_in(wanted, name): file for name, file in found.items()}
    if renamed.keys() != wanted.keys():
        raise ValueError(
            f"{path}: must hold the parameters of {like}, got without "
            f"{sorted(wanted.keys() - renamed.keys())[:5]} and with "
            f"{sorted(renamed.keys() - wanted.keys())[:5]}; name the model's own directory"
        )
    tensors = {name: _shaped(renamed[name], name, wanted[name]) for name in wanted}
    return Source(path, "universal checkpoint", tensors, step_of(path), like)


def _name_in(wanted: dict[str, Stored], name: str) -> str:
    """The name without what wrappers put before it."""
    rest = name
    while rest and rest not in wanted:
        rest = rest.partition(".")[2]
    return rest or name


def _shaped(file: Path, name: str, wanted: Stored) -> Stored:
    content = read_torch_file(file)
    stored = content.get("param", content.get(""))
    if stored is None or stored.size != wanted.size:
        raise ValueError(
            f"{file}: must hold the {wanted.size} elements of {name}, got "
            f"{'none' if stored is None else stored.size}; convert the checkpoint again"
        )
    return Stored(stored.dtype, wanted.shape, stored.places)
