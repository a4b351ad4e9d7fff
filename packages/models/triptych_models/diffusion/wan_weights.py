"""Wan's weights in diffusers' layout: config.json and safetensors, one or many with an index."""

import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..export import ShardWriter
from ..weights import (
    Gather,
    fill_modules,
    open_weights,
    own_parameters,
    read_index,
    whole,
)

NAME = "diffusion_pytorch_model"
FIRST = "patch_embedding.weight"


@torch.no_grad()
def load_wan(net: nn.Module, folder: Path, gather: Gather = whole) -> None:
    """Read a folder's tensors into the net, a module at a time.

    Of a net with room for a source video beside latents, weights may be those of one without: new
    channels are 0, so that it begins as that.

    Raises ValueError that lists tensors missing, unexpected or of another shape.
    """
    index, single = folder / f"{NAME}.safetensors.index.json", folder / f"{NAME}.safetensors"
    paths = (
        [folder / file for file in set(read_index(index).values())] if index.is_file() else [single]
    )
    modules = list(own_parameters(net))
    wanted = {name.removeprefix(".") for _, own in modules for name in own}
    with ExitStack() as stack:
        readers = [stack.enter_context(open_weights(path)) for path in paths]
        found = {name: reader for reader in readers for name in list(reader.keys())}
        if found.keys() != wanted:
            raise ValueError(
                f"{folder}: tensors must be those of its config.json, got missing "
                f"{sorted(wanted - found.keys())[:8]} and unexpected "
                f"{sorted(found.keys() - wanted)[:8]}; download all of its files again"
            )

        def read(name: str) -> Tensor:
            tensor: Tensor = found[name].get_tensor(name)
            return _widened(tensor, net) if name == FIRST else tensor

        fill_modules(modules, read, gather, where=folder, remedy="check its config.json")


def export_wan(
    net: Any,
    out_dir: Path,
    *,
    dtype: torch.dtype = torch.float32,
    gather: Gather = whole,
    is_main: bool = True,
) -> None:
    """Write a folder that diffusers' `from_pretrained` loads; complete or absent."""
    partial = out_dir.with_name(f".{out_dir.name}.partial")
    writer = None
    if is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / "config.json").write_text(json.dumps(dict(net.config), indent=2) + "\n")
        writer = ShardWriter(partial, 5 * 10**9, NAME)
    for _, own in own_parameters(net):
        with gather(list(own.values())):
            for name, parameter in own.items():
                if writer is not None:
                    value = parameter.detach().to("cpu", dtype, copy=True)
                    writer.add(name.removeprefix("."), value)
    if writer is not None:
        writer.finish()
        shutil.rmtree(out_dir, ignore_errors=True)
        partial.rename(out_dir)


def _widened(weight: Tensor, net: Any) -> Tensor:
    """The first convolution's (W, C, ...), filled up with zeros for C or 2 C channels more."""
    channels = net.config.out_channels
    more = net.config.in_channels - weight.shape[1]
    if weight.shape[1] != channels or more not in (channels, 2 * channels):
        return weight
    return torch.cat([weight, weight.new_zeros(len(weight), more, *weight.shape[2:])], 1)
