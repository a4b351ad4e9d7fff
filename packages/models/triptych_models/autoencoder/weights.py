"""RAE's weights in diffusers' layout of AutoencoderRAE: config.json and one safetensors file."""

import json
import math
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..export import ShardWriter
from ..foreign_config import read_foreign
from ..weights import Gather, constant, fill_modules, open_weights, own_parameters, whole
from .discriminator import POWER_STEPS, SpectralConv
from .encoder import KIND, NAME
from .rae import RAE


@torch.no_grad()
def initialize(model: RAE, seed: int, gather: Gather = whole) -> None:
    """Draw first weights: the same on any device and number of ranks.

    The decoder's by ViTMAE's rule, normal(0.02), biases and class token 0; the discriminator's
    uniform, by the number of inputs, as torch's convolutions.
    """
    generator = torch.Generator().manual_seed(seed)
    for module, own in own_parameters(model):
        with gather(list(own.values())):
            for name, parameter in own.items():
                parameter.copy_(_first_value(module, name, parameter, generator))
            if isinstance(module, SpectralConv):
                for vector in (module.left, module.right):
                    drawn = torch.normal(0.0, 1.0, vector.shape, generator=generator)
                    vector.copy_(F.normalize(drawn, dim=0))
                module.renew(POWER_STEPS)


@torch.no_grad()
def load_decoder(model: RAE, folder: Path, gather: Gather = whole) -> None:
    """Read the decoder's tensors of a folder. Raises ValueError for those of another shape."""
    file = folder / NAME
    kind = read_foreign(folder / "config.json").get("_class_name")
    if kind != KIND:
        raise ValueError(
            f"{folder}/config.json: must be of {KIND}, got {kind}; name the folder of an RAE"
        )
    modules = [
        (module, {name.removeprefix("."): p for name, p in own.items()})
        for module, own in own_parameters(model)
        if not any(name.startswith("discriminator.") for name in own)
    ]
    wanted = {name for _, own in modules for name in own}
    with open_weights(file) as reader:
        held = {name for name in reader.keys() if name.startswith("decoder.")}  # noqa: SIM118
        held.discard("decoder.decoder_pos_embed")  # a constant
        if held != wanted:
            raise ValueError(
                f"{file}: the decoder's tensors must be those of the model, got missing "
                f"{sorted(wanted - held)[:8]} and unexpected {sorted(held - wanted)[:8]}; check "
                "model.decoder"
            )
        fill_modules(modules, reader.get_tensor, gather, where=file, remedy="check model.decoder")


def export_rae(
    model: RAE,
    out_dir: Path,
    *,
    dtype: torch.dtype = torch.float32,
    gather: Gather = whole,
    is_main: bool = True,
) -> None:
    """Write a folder of diffusers' `AutoencoderRAE`; complete or absent.

    Stock loads it where the encoder is one it builds: heads of 64 channels, published sizes. The
    discriminator is not in it. Every rank calls it, is_main writes.
    """
    partial = out_dir.with_name(f".{out_dir.name}.partial")
    writer = None
    if is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        text = json.dumps(model.diffusers_config(), indent=2)
        (partial / "config.json").write_text(f"{text}\n")
        writer = ShardWriter(partial, 2**62, "diffusion_pytorch_model")
        for name, value in model.frozen_tensors().items():
            writer.add(name, value.to(dtype))
    for _, own in own_parameters(model):
        with gather(list(own.values())):
            for name, parameter in own.items():
                if writer is not None and name.startswith("decoder."):
                    value = parameter.detach().to("cpu", dtype, copy=True)
                    writer.add(name.removeprefix("."), value)
    if writer is not None:
        writer.finish()
        shutil.rmtree(out_dir, ignore_errors=True)
        partial.rename(out_dir)


def _first_value(
    module: nn.Module, name: str, parameter: Tensor, generator: torch.Generator
) -> Tensor:
    if isinstance(module, SpectralConv):
        reach = 1 / math.sqrt(module.in_channels * module.kernel_size[0])
        # By way of a normal, whose generator is the same on every device.
        drawn = torch.normal(0.0, 1.0, parameter.shape, generator=generator, device="cpu")
        return reach * torch.erf(drawn / math.sqrt(2))
    if name.endswith((".bias", ".trainable_cls_token")):
        return constant(0.0, parameter)
    if "norm" in name:
        return constant(1.0, parameter)
    return torch.normal(0.0, 0.02, parameter.shape, generator=generator, device="cpu")
