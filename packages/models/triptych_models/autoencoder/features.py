"""Frozen networks that look at images: read from folders, never drawn at random unasked."""

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..checkpointing import compile_forward
from ..foreign_config import read_foreign
from .config import FrozenConfig

VITS = ("vit", "dinov2", "dinov2_with_registers")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
UNUSED = ("pooler.", "mask_token")  # of weights that a folder may be without


class VitFeatures(nn.Module):
    """Patch tokens after some blocks of a ViT of transformers'.

    Args:
        vit: a ViT, DINOv2, or that with registers.
        depths: of the blocks, from 0; -1 is the last.
        mean, std: of the pixels that it was trained on.
    """

    def __init__(
        self, vit: Any, depths: Sequence[int], mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.vit = keep_positions(vit)
        self.depths = [depth % vit.config.num_hidden_layers for depth in depths]
        for name, values in (("mean", mean), ("std", std)):
            rows = torch.tensor(list(values)).view(1, 3, 1, 1)
            self.register_buffer(name, rows, persistent=False)
        self._prefix = 1 + getattr(vit.config, "num_register_tokens", 0)
        # DINOv2 fits its positions to any image by itself.
        self._more = {"interpolate_pos_encoding": True} if vit.config.model_type == "vit" else {}

    @property
    def patch(self) -> int:
        """Pixels of a patch's side."""
        return int(self.vit.config.patch_size)

    @property
    def width(self) -> int:
        """Channels of a token."""
        return int(self.vit.config.hidden_size)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N, 3, S, S) from 0 to 1, S a multiple of the patches -> at each depth (N, L, C)."""
        x = (images - self.get_buffer("mean")) / self.get_buffer("std")
        dtype = next(self.vit.parameters()).dtype
        found = self.vit(x.to(dtype), output_hidden_states=True, **self._more)
        return [found.hidden_states[depth + 1][:, self._prefix :] for depth in self.depths]

    def compile_layers(self) -> None:
        """Compile every layer in place."""
        compile_frozen(self.vit)


def load_vit(
    config: FrozenConfig, key: str, depths: Sequence[int], seed: int, dtype: torch.dtype
) -> VitFeatures:
    """The ViT in a folder, of dtype. Raises ValueError, which begins with `key`, for others."""
    assert config.path is not None
    shape = read_foreign(config.path / "config.json")
    kind, layers = shape.get("model_type"), shape.get("num_hidden_layers", 12)
    if kind not in VITS:
        raise ValueError(
            f"{key}.path: must hold a {', '.join(VITS)}, got {kind}; name facebook/dino-vits8's "
            "folder, say"
        )
    if not all(-layers <= depth < layers for depth in depths):
        raise ValueError(
            f"{key}.depths: must be below the {layers} blocks of {config.path}, got "
            f"{list(depths)}; name others"
        )
    vit = load_frozen(config, key, seed, AutoModel).to(dtype)
    return VitFeatures(vit, depths, *pixel_statistics(config.path, MEAN, STD))


def load_frozen(config: FrozenConfig, key: str, seed: int, cls: Any) -> nn.Module:
    """A network of transformers' in fp32, of which nothing trains, in evaluation.

    Raises ValueError where a folder lacks weights.
    """
    assert config.path is not None
    if config.init == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            shape = AutoConfig.from_pretrained(config.path, local_files_only=True)
            shape = getattr(shape, "vision_config", shape)
            net: Any = (
                cls.from_config(shape) if hasattr(cls, "from_config") else cls._from_config(shape)
            )
    else:
        try:
            net, report = cls.from_pretrained(
                config.path, local_files_only=True, dtype=torch.float32, output_loading_info=True
            )
        except OSError as error:
            raise ValueError(
                f"{key}.path: must hold config.json and weights, got {config.path} ({error}); "
                "download it again"
            ) from error
        lacking = sorted(
            name
            for name in {*report["missing_keys"], *map(str, report["mismatched_keys"])}
            if not any(part in name for part in UNUSED)
        )
        if lacking:
            raise ValueError(
                f"{key}.path: must hold all weights of its config.json, got {config.path} without "
                f"{lacking[:4]}; download it again"
            )
    frozen: nn.Module = net.float().requires_grad_(False).eval()
    return frozen


def keep_positions(net: Any) -> Any:
    """Have a frozen ViT of transformers' fit its positions to a size of images once.

    In every forward it is a bicubic that reads all channels in a row: 3.4 ms on an H200 for 384.
    """
    for module in net.modules():
        if hasattr(module, "interpolate_pos_encoding"):
            module.interpolate_pos_encoding = partial(_positions, module, {})
    return net


def compile_frozen(net: nn.Module) -> None:
    """Compile every layer of a network of transformers' in place: one graph with and one without
    gradients, of sizes that become dynamic at their second value.

    Under a torch whose compiler does not know context variables (2.11), which transformers' hooks
    on attention read, they stay as they are.
    """
    from torch._dynamo import variables  # here: importing it takes a second

    if not hasattr(variables, "ContextVarVariable"):
        return
    for module in net.modules():
        if isinstance(module, GradientCheckpointingLayer):
            compile_forward(module)


def pixel_statistics(
    folder: Path, mean: Sequence[float], std: Sequence[float]
) -> tuple[list[float], list[float]]:
    """Means and spreads by which a folder's preprocessor normalizes; else those given."""
    file = folder / "preprocessor_config.json"
    held = json.loads(file.read_text()) if file.is_file() else {}
    return list(held.get("image_mean", mean)), list(held.get("image_std", std))


def resized(images: Tensor, side: int) -> Tensor:
    """(N, 3, S, S) -> (N, 3, side, side): by area where that is smaller, else bicubic."""
    if images.shape[-1] == side:
        return images
    mode = "area" if images.shape[-1] > side else "bicubic"
    return F.interpolate(images, size=(side, side), mode=mode)


@torch.no_grad()
def digest(net: nn.Module) -> str:
    """Of all weights: a frozen network is in no checkpoint, and must be the same after it."""
    found = hashlib.sha256()
    for name, value in sorted(net.state_dict().items()):
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def _positions(
    module: Any, kept: dict[Any, Any], embeddings: Tensor, height: int, width: int
) -> Tensor:
    """What `module.interpolate_pos_encoding` gives, of the weights that it has now."""
    weights = list(module.parameters())  # kept beside it: or another could have one's id
    key = height, width, embeddings.shape[1], *((id(w), w._version, w.device) for w in weights)
    if key not in kept:
        kept.clear()
        with torch.no_grad():
            found = type(module).interpolate_pos_encoding(module, embeddings, height, width)
        kept[key] = found, weights
    result: Tensor = kept[key][0]
    return result
