"""What a stage's YAML says about a representation autoencoder. Imports no torch.

Defaults are those of RAE (arXiv 2510.11690).
"""

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..catalogue import AUTOENCODERS

# (hidden_size, num_layers, num_heads, intermediate_size) of the published decoders.
SIZES = {"B": (768, 12, 12, 3072), "L": (1024, 24, 16, 4096), "XL": (1152, 28, 16, 4096)}


class FrozenConfig(BaseModel):
    """A network that never trains: a folder of Hugging Face's, with its weights."""

    model_config = ConfigDict(extra="forbid")

    path: Path | None = Field(default=None, description="its folder")
    init: Literal["pretrained", "random"] = Field(
        default="pretrained",
        description="random: of the folder only config.json is read, or a VGG16 is drawn where "
        "there is none; for tests alone",
    )

    def check_path(self, key: str) -> None:
        """Raise ValueError unless the folder, if there is one, is there."""
        if self.path is not None and not self.path.is_dir():
            raise ValueError(f"{key}.path: must be a folder, got {self.path}; correct the path")


class DecoderConfig(BaseModel):
    """The shape of the decoder: a transformer from latents to patches of pixels."""

    model_config = ConfigDict(extra="forbid")

    size: Literal["B", "L", "XL", "custom"] = Field(
        default="XL", description="width, layers, heads, MLP; custom: the four keys below"
    )
    hidden_size: int = Field(default=0, ge=0, description="with size=custom; a multiple of 4")
    num_layers: int = Field(default=0, ge=0, description="with size=custom")
    num_heads: int = Field(default=0, ge=0, description="with size=custom")
    intermediate_size: int = Field(default=0, ge=0, description="with size=custom")
    patch_size: int = Field(default=16, ge=1, le=64, description="pixels of a latent's side")

    @model_validator(mode="after")
    def _settle_size(self) -> Self:
        named = (self.hidden_size, self.num_layers, self.num_heads, self.intermediate_size)
        if self.size == "custom":
            if not all(named) or self.hidden_size % 4 or self.hidden_size % self.num_heads:
                raise ValueError(
                    "model.decoder.hidden_size: must come with num_layers, num_heads and "
                    f"intermediate_size, as a multiple of 4 and of num_heads, got {named}; name all"
                )
        elif any(named) and named != SIZES[self.size]:
            raise ValueError(
                f"model.decoder.size: must be custom with a hidden_size, got {self.size}; leave "
                "out one of them"
            )
        else:
            shape = SIZES[self.size]
            self.hidden_size, self.num_layers, self.num_heads, self.intermediate_size = shape
        return self


class RAEModelConfig(BaseModel):
    """Which autoencoder to build, where its weights come from and what of it trains."""

    model_config = ConfigDict(extra="forbid")

    encoder: FrozenConfig = Field(
        default_factory=FrozenConfig,
        description="a DINOv2 with registers, SigLIP, SigLIP2 or MAE in transformers' layout, or "
        "an AutoencoderRAE in diffusers'; {path, init}",
    )
    input_size: int = Field(
        default=224, ge=1, le=2**12, description="side to which the encoder's images are resized"
    )
    noise: float = Field(
        default=0.8,
        ge=0,
        description="tau: latents get normal noise of a spread drawn from [0, tau] in training",
    )
    decoder: DecoderConfig = DecoderConfig()
    path: Path | None = Field(
        default=None, description="an AutoencoderRAE in diffusers' layout, for its decoder"
    )
    init: Literal["pretrained", "random"] = Field(
        default="random", description="of the decoder: read from path, or drawn from seed"
    )
    seed: int = Field(default=0, ge=0, description="of random weights; the same on any ranks")
    freeze: list[str] = Field(default_factory=list, description="parts that do not train")
    compile: Literal["auto", "none", "layers"] = Field(
        default="auto", description="layers: torch.compile each block; auto: on CUDA"
    )

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        parts = AUTOENCODERS["rae"].parts
        for part in self.freeze:
            if part not in parts:
                raise ValueError(
                    f"model.freeze: must name parts of the model ({', '.join(parts)}), got {part}; "
                    "leave it out"
                )
        if {"embedders", "blocks", "head"} <= set(self.freeze):
            raise ValueError("model.freeze: must leave a part to train, got all; name fewer")
        if self.init == "pretrained" and self.path is None:
            raise ValueError("model.path: must be given with model.init=pretrained, got nothing")
        return self

    def check_path(self) -> None:
        """Raise ValueError unless the folders are there; called before anything heavy is
        imported."""
        if self.encoder.path is None:
            raise ValueError(
                "model.encoder.path: must be a folder with the encoder's config.json and weights, "
                "got nothing; name that of facebook/dinov2-with-registers-base, say"
            )
        self.encoder.check_path("model.encoder")
        if self.path is not None and not self.path.is_dir():
            raise ValueError(f"model.path: must be a folder, got {self.path}; correct the path")


class PerceptualConfig(FrozenConfig):
    """How alike an image and its reconstruction look to a frozen network; off without a folder.

    A folder with config.json is a ViT of transformers'. Otherwise its .pth and .safetensors files
    are torchvision's VGG16 (`features.0.weight` …) and, if they are there, LPIPS's weights of
    channels (`lin0.model.1.weight` …; arXiv 1801.03924): without them all channels count alike.
    """

    weight: float = Field(default=1.0, ge=0, description="times the distance, beside L1; 0: off")
    depths: list[int] = Field(
        default_factory=lambda: [2, 5, 8, 11],
        min_length=1,
        description="of a ViT: blocks, from 0, whose outputs are compared",
    )

    @property
    def is_on(self) -> bool:
        """Whether there is such a loss."""
        return self.path is not None and self.weight > 0


class AdversaryConfig(FrozenConfig):
    """A discriminator: heads that train, on features of a frozen ViT; off without a folder."""

    weight: float = Field(
        default=0.75,
        ge=0,
        description="times the adaptive weight, by which both losses pull alike at the decoder's "
        "last layer; 0: off",
    )
    most: float = Field(default=1e4, gt=0, description="of the adaptive weight")
    discriminator_start: int = Field(
        default=1, ge=1, description="first step in which the discriminator trains"
    )
    start: int = Field(default=1, ge=1, description="first step in which the decoder heeds it")
    depths: list[int] = Field(
        default_factory=lambda: [2, 5, 8, 11],
        min_length=1,
        description="blocks, from 0, whose outputs get a head; what the last block gives has one "
        "more",
    )
    kernel_size: int = Field(default=9, ge=1, description="of a head's convolution; odd")
    image_size: int = Field(default=224, ge=1, description="side to which it resizes images")
    augment: list[Literal["color", "translation", "cutout"]] = Field(
        default_factory=lambda: ["color", "translation"],  # type: ignore[arg-type]
        description="how all it sees is changed at random (arXiv 2006.10738)",
    )

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.discriminator_start > self.start:
            raise ValueError(
                "adversary.start: must not come before adversary.discriminator_start "
                f"({self.discriminator_start}), got {self.start}; raise it"
            )
        if self.kernel_size % 2 == 0:
            raise ValueError(
                f"adversary.kernel_size: must be odd, got {self.kernel_size}; take one more"
            )
        return self

    @property
    def is_on(self) -> bool:
        """Whether there is a discriminator."""
        return self.path is not None and self.weight > 0
