"""Tiny frozen networks in folders, and an autoencoder of them of which nothing is zero."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)

from triptych_models.autoencoder.config import AdversaryConfig, PerceptualConfig, RAEModelConfig

DECODER = {
    "size": "custom",
    "hidden_size": 24,
    "num_layers": 2,
    "num_heads": 2,
    "intermediate_size": 40,
    "patch_size": 4,
}
WAYS = ["color", "translation", "cutout"]
# The sizes that diffusers' AutoencoderRAE leaves free; heads have 64 channels.
FREE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "patch_size": 14}


def shake(net: torch.nn.Module, seed: int) -> Any:
    """Move every weight: biases of 0 and norms of 1 would not be missed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return net


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, torch draws the same numbers whatever was drawn before; outside, as it would have."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@seeded(1)
def write_encoder(path: Path, kind: str = "dinov2") -> Path:
    """A folder of an encoder."""
    if kind == "dinov2":
        config = Dinov2WithRegistersConfig(**FREE, image_size=518)
        net: Any = Dinov2WithRegistersModel(config)
    elif kind == "siglip2":
        net = SiglipVisionModel(SiglipVisionConfig(**FREE | {"patch_size": 16}, image_size=256))
    else:
        net = ViTMAEModel(ViTMAEConfig(**FREE | {"patch_size": 16}, image_size=224))
    shake(net, 1).save_pretrained(path)
    return path


def write_vit(path: Path, seed: int = 2) -> Path:
    """A folder of a network that judges."""
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = ViTConfig(**shape, intermediate_size=24, image_size=16, patch_size=4)
    with seeded(seed):
        shake(ViTModel(config), seed).save_pretrained(path)
    return path


def configs(
    folder: Path, kind: str = "dinov2", **adversary: Any
) -> tuple[RAEModelConfig, PerceptualConfig, AdversaryConfig]:
    """Of an autoencoder of 2 by 2 latents and images of 8 by 8 pixels, and its judges."""
    if not folder.is_dir():
        write_encoder(folder / kind, kind)
        write_vit(folder / "like", 2)
        write_vit(folder / "critic", 3)
    side = 28 if kind == "dinov2" else 32
    return (
        RAEModelConfig(encoder={"path": folder / kind}, input_size=side, decoder=DECODER),
        PerceptualConfig(path=folder / "like", depths=[0, 1], weight=0.7),
        AdversaryConfig(
            path=folder / "critic",
            depths=[0],
            image_size=12,
            kernel_size=3,
            augment=WAYS,
            **adversary,
        ),
    )


def draw_batch(count: int, seed: int = 4) -> dict[str, Any]:
    """What the loader gives for the configurations above; the last image is not there."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.ones(count)
    weights[-1] = 0
    return {
        "pixels": torch.randint(0, 256, (count, 3, 8, 8), generator=generator).to(torch.uint8),
        "noise": torch.randn(count, 4, 64, generator=generator),
        "levels": torch.rand(count, generator=generator),
        "draws": torch.rand(count, 3, 7, generator=generator),
        "weights": weights,
        "num_targets": count - 1,
    }
