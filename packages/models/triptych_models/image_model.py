"""What families that see images share: pixel statistics, the processor they need, their tower."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from transformers import PretrainedConfig

from .checkpointing import compile_forward
from .layout import tower
from .packed import PackedModel
from .vision import embed_by_product


class ImageModel(PackedModel):
    """A packed model with a vision tower, whose pixels are scaled by `image_mean`, `image_std`."""

    def __init__(
        self,
        hf_config: PretrainedConfig,
        *,
        dtype: torch.dtype,
        image_mean: list[float],
        image_std: list[float],
        fused: bool = True,
    ) -> None:
        super().__init__(hf_config, dtype=dtype, fused=fused)
        for module in (tower(self.hf) or nn.Module()).modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                embed_by_product(module)
        self.image_mean = image_mean
        self.image_std = image_std

    @classmethod
    def from_directory(cls, path: Path, **settings: Any) -> Self:
        """As every family's; with preprocessor_config.json, which says how pixels are scaled."""
        mean, std = image_statistics(path)
        return super().from_directory(path, image_mean=mean, image_std=std, **settings)

    def image_rules(self) -> dict[str, Any]:
        """What the data's processor must say of images, by the name of its attribute."""
        raise NotImplementedError

    def tower_layers(self) -> Sequence[nn.Module]:
        """The layers of the tower that run."""
        raise NotImplementedError

    def projector_tokens(self, patches: int) -> int:
        """How many features the projector gives for the patches of whole images."""
        merge_size: int = getattr(self.hf.config.vision_config, "spatial_merge_size", 1)
        return patches // merge_size**2

    def check_processor(self, processor: Any) -> None:
        """Raise ValueError unless the data's processor cuts images as this model expects."""
        super().check_processor(processor)
        for name, value in self.image_rules().items():
            given = getattr(processor, name)
            if given != value:
                raise ValueError(
                    f"model.path: {name} of the processor files must be config.json's {value}, "
                    f"got {given}; take all files of the folder from one model"
                )

    def layers(self) -> list[nn.Module]:
        """Every layer that runs of the tower, and of the language model."""
        return [*self.tower_layers(), *super().layers()]

    def compile_layers(self) -> None:
        """Compile every layer in place; the tower's for any number of patches."""
        super().compile_layers()
        for block in self.tower_layers():
            compile_forward(block, dynamic=True)


def image_statistics(path: Path) -> tuple[list[float], list[float]]:
    """Mean and std per channel from preprocessor_config.json, 0.5 where it says nothing."""
    file = path / "preprocessor_config.json"
    preprocessor = json.loads(file.read_text()) if file.is_file() else {}
    half = [0.5, 0.5, 0.5]
    return preprocessor.get("image_mean", half), preprocessor.get("image_std", half)
