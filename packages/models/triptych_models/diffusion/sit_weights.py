"""SiT's weights in the layout of the official checkpoints: one flat file of names and tensors."""

import json
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..weights import Gather, fill_modules, own_parameters, whole
from .config import ObjectiveConfig
from .sit import SiT

TABLE = "pos_embed"  # a constant that the layout holds beside the parameters


@torch.no_grad()
def load_sit(net: SiT, path: Path, gather: Gather = whole) -> None:
    """Read a .pt or .safetensors file into the net; of a training checkpoint its `ema`.

    Nothing in it is run. Raises ValueError that lists tensors missing, unexpected or of another
    shape, and for a table of positions that is another.
    """
    stored = _read(path)
    table = stored.pop(TABLE, None)
    modules = list(own_parameters(net))
    wanted = {name.removeprefix(".") for _, own in modules for name in own}
    if stored.keys() != wanted:
        raise ValueError(
            f"{path}: tensors must be those of the model, got missing "
            f"{sorted(wanted - stored.keys())} and unexpected {sorted(stored.keys() - wanted)}; "
            "check model.sit"
        )
    if table is not None and not _alike(table, net.pos_embed):
        raise ValueError(
            f"{path}: {TABLE} must be of model.sit.image_size and patch_size, got "
            f"{list(table.shape)}, not {list(net.pos_embed.shape)} of our values; change them"
        )
    fill_modules(modules, stored.__getitem__, gather, where=path, remedy="check model.sit")


def export_sit(
    net: SiT,
    out_dir: Path,
    objective: ObjectiveConfig,
    *,
    dtype: torch.dtype = torch.float32,
    gather: Gather = whole,
    is_main: bool = True,
) -> None:
    """Write out_dir/model.pt, which the official code loads, and out_dir/config.json.

    Every rank must call it, since gather is collective; only is_main writes. A file is complete or
    absent.
    """
    tensors: dict[str, Tensor] = {TABLE: net.pos_embed.detach().float().cpu()}
    for _, own in own_parameters(net):
        with gather(list(own.values())):
            for name, parameter in own.items():
                if is_main:
                    value = parameter.detach().to("cpu", dtype, copy=True)
                    tensors[name.removeprefix(".")] = value
    if is_main:
        out_dir.mkdir(parents=True, exist_ok=True)
        partial = out_dir / ".model.pt.partial"
        torch.save(tensors, partial)
        partial.replace(out_dir / "model.pt")
        facts = {"sit": net.config.model_dump(), "objective": objective.model_dump()}
        (out_dir / "config.json").write_text(json.dumps(facts, indent=2) + "\n")


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        stored: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, UnpicklingError, ValueError, KeyError) as error:
        first = str(error).splitlines()[0] if str(error) else repr(error)
        raise ValueError(
            f"{path}: must be a whole file of tensors, got {first}; download it again, or save its "
            "`ema` alone"
        ) from error
    if isinstance(stored, Mapping) and isinstance(stored.get("ema"), Mapping):
        stored = stored["ema"]
    if not isinstance(stored, Mapping) or not all(isinstance(x, Tensor) for x in stored.values()):
        raise ValueError(
            f"{path}: must hold names and tensors, got {type(stored).__name__}; name another file"
        )
    return dict(stored)


def _alike(table: Tensor, ours: Tensor) -> bool:
    return table.shape == ours.shape and bool(
        torch.allclose(table.float(), ours.float(), atol=1e-4)
    )
