"""How alike two images look: distances of features that a frozen network has of them.

LPIPS (arXiv 1801.03924): features of unit length at every place, the squares of their differences
weighed by channel, their mean over places, the sum over layers.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..checkpointing import CompiledForward
from .config import PerceptualConfig
from .features import VitFeatures, load_vit

# torchvision's VGG16 before its classifier, "M" for a pooling; LPIPS takes what is before one.
VGG = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of pixels from -1 to 1
EPS = 1e-10


class VggFeatures(nn.Module):
    """What VGG16 has of images before each of its five poolings."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in VGG:
            if isinstance(width, int):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            else:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        for name, values in (("shift", SHIFT), ("scale", SCALE)):
            rows = torch.tensor(values).view(1, 3, 1, 1)
            self.register_buffer(name, rows, persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N, 3, H, W) from 0 to 1 -> five of (N, L, C)."""
        x = (2 * images - 1 - self.get_buffer("shift")) / self.get_buffer("scale")
        x = x.to(next(self.parameters()).dtype)
        found = []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                found.append(x.flatten(2).transpose(1, 2))
            x = layer(x)
        return found


class Perceptual(nn.Module):
    """A distance of images by their features.

    Args:
        features: images to (N, L, C) of each layer.
        weights: (C,) of each layer's channels; None: 1.
    """

    def __init__(
        self, features: VitFeatures | VggFeatures, weights: Sequence[Tensor] | None = None
    ) -> None:
        super().__init__()
        self.features = features
        for number, weight in enumerate(weights or ()):
            self.register_buffer(f"weight_{number}", weight)
        self.is_weighed = weights is not None
        self._compare: Callable[..., Tensor] = _distance

    def forward(self, made: Tensor, images: Tensor) -> Tensor:
        """(N,) fp32, of images (N, 3, H, W) from 0 to 1 and those made of them."""
        with torch.no_grad():
            wanted = self.features(images)
        total = made.new_zeros(len(made))
        for number, (a, b) in enumerate(zip(self.features(made), wanted, strict=True)):
            weight = self.get_buffer(f"weight_{number}") if self.is_weighed else None
            total = total + self._compare(a, b, weight)
        return total

    def compile_layers(self) -> None:
        """Compile a ViT's layers in place, and how features are compared."""
        if isinstance(self.features, VitFeatures):
            self.features.compile_layers()
        self._compare = CompiledForward(_distance, None)


def load_perceptual(config: PerceptualConfig, seed: int, dtype: torch.dtype) -> Perceptual:
    """What the folder holds, of dtype. Raises ValueError where that is neither network."""
    assert config.path is not None
    if (config.path / "config.json").is_file():
        return Perceptual(load_vit(config, "perceptual", config.depths, seed, dtype))
    if config.init == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Perceptual(VggFeatures().to(dtype).requires_grad_(False).eval())
    held: dict[str, Tensor] = {}
    for file in sorted(config.path.iterdir()):
        if file.suffix in (".pth", ".pt", ".safetensors"):
            held |= _read(file)
    vgg = VggFeatures()
    wanted = vgg.state_dict()
    lacking = [n for n, v in wanted.items() if n not in held or held[n].shape != v.shape]
    if lacking:
        raise ValueError(
            f"perceptual.path: must hold config.json, or torchvision's VGG16 in .pth or "
            f".safetensors, got {config.path} without {lacking[:3]}; put vgg16-397923af.pth there"
        )
    vgg.load_state_dict({name: held[name] for name in wanted})
    lins = [held.get(f"lin{i}.model.1.weight") for i in range(5)]
    widths = [64, 128, 256, 512, 512]
    weights = [lin.float().view(-1) for lin in lins if lin is not None]
    if weights and [len(weight) for weight in weights] != widths:
        raise ValueError(
            f"perceptual.path: must hold LPIPS's weights lin0 to lin4 of {widths} channels, or "
            f"none, got {[len(weight) for weight in weights]} in {config.path}; download vgg.pth "
            "again"
        )
    vgg.features.to(dtype)
    return Perceptual(vgg.requires_grad_(False).eval(), weights or None)


def _distance(a: Tensor, b: Tensor, weight: Tensor | None) -> Tensor:
    """(N,) fp32, of features (N, L, C) and weights of channels (C,)."""
    squares = (_unit(a) - _unit(b)).square()
    if weight is not None:
        squares = squares * weight
    return squares.sum(-1).mean(-1)


def _unit(features: Tensor) -> Tensor:
    wide = features.float()
    # Of a vector of zeros its gradient is zero; that of a root would be no number.
    return wide / (torch.linalg.vector_norm(wide, dim=-1, keepdim=True) + EPS)


def _read(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        stored: Any = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, UnpicklingError, ValueError, KeyError) as error:
        raise ValueError(
            f"{file}: must be a whole file of tensors, got {error!r:.200}; download it again"
        ) from error
    if not isinstance(stored, Mapping):
        raise ValueError(
            f"{file}: must hold names and tensors, got {type(stored).__name__}; save its state_dict"
        )
    return {name: value for name, value in stored.items() if isinstance(value, Tensor)}
