"""What a stage's YAML says about a diffusion model. Imports no torch."""

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..catalogue import DENOISERS

Interpolation = Literal["linear", "gvp", "vp"]
Prediction = Literal["velocity", "noise", "score"]
Family = Literal["sit", "wan"]

# (hidden_size, num_layers, num_heads): table 1 of DiT (arXiv 2212.09748), which SiT keeps.
SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}


class SiTConfig(BaseModel):
    """The shape of a SiT (arXiv 2401.08740): a transformer over patches of latents."""

    model_config = ConfigDict(extra="forbid")

    size: Literal["S", "B", "L", "XL", "custom"] = Field(
        default="XL", description="width, layers and heads; custom: the three keys below"
    )
    hidden_size: int = Field(default=0, ge=0, description="with size=custom; a multiple of 4")
    num_layers: int = Field(default=0, ge=0, description="with size=custom")
    num_heads: int = Field(default=0, ge=0, description="with size=custom")
    patch_size: Literal[1, 2, 4, 8] = Field(default=2, description="side of a token, in latents")
    image_size: int = Field(default=32, ge=1, description="side of the latents: 32 for 256² images")
    channels: int = Field(default=4, ge=1, description="of the latents")
    num_classes: int = Field(default=1000, ge=1, description="of labels, from 0")
    learn_sigma: bool = Field(
        default=False,
        description="the official checkpoints' second half of output channels, which nothing reads",
    )

    @model_validator(mode="after")
    def _settle_size(self) -> Self:
        named = (self.hidden_size, self.num_layers, self.num_heads)
        if self.size == "custom":
            if not all(named) or self.hidden_size % 4 or self.hidden_size % self.num_heads:
                raise ValueError(
                    "model.sit.hidden_size: must come with num_layers and num_heads, as a multiple "
                    f"of 4 and of num_heads, got {named}; name all three"
                )
        elif any(named) and named != SIZES[self.size]:
            raise ValueError(
                f"model.sit.size: must be custom with a hidden_size, got {self.size}; leave out "
                "one of them"
            )
        else:
            self.hidden_size, self.num_layers, self.num_heads = SIZES[self.size]
        if self.image_size % self.patch_size:
            raise ValueError(
                f"model.sit.image_size: must be a multiple of patch_size ({self.patch_size}), got "
                f"{self.image_size}; change one of them"
            )
        return self

    @property
    def num_tokens(self) -> int:
        """Of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def out_channels(self) -> int:
        """Of what the last layer gives."""
        return 2 * self.channels if self.learn_sigma else self.channels


class ObjectiveConfig(BaseModel):
    """What the model learns: x_t = alpha(t) data + sigma(t) noise, from noise at t = 0 to data."""

    model_config = ConfigDict(extra="forbid")

    path: Interpolation = Field(
        default="linear",
        description="alpha, sigma: linear t, 1 - t; gvp sin, cos of pi t / 2; vp of DDPM",
    )
    prediction: Prediction = Field(default="velocity", description="what the model gives")
    weighting: Literal["none", "velocity", "likelihood"] = Field(
        default="none",
        description="of a squared error of noise or score: as if of the velocity, or of the "
        "likelihood's bound",
    )
    times: Literal["uniform", "logit_normal"] = Field(
        default="uniform", description="how t is drawn; logit_normal: sigmoid of a normal"
    )
    shift: float = Field(
        default=1.0,
        gt=0,
        description="s: noise levels u = 1 - t become s u / (1 + (s - 1) u); more than 1 for large "
        "images and videos",
    )
    condition_dropout: float = Field(
        default=0.1, ge=0, lt=1, description="share of samples that learn without label or text"
    )

    @model_validator(mode="after")
    def _check_weighting(self) -> Self:
        if self.prediction == "velocity" and self.weighting != "none":
            raise ValueError(
                "objective.weighting: must be none for the prediction of velocity, got "
                f"{self.weighting}; leave it out"
            )
        return self


class SamplerConfig(BaseModel):
    """How noise becomes data: by the probability flow's ODE, or an SDE of the same marginals."""

    model_config = ConfigDict(extra="forbid")

    method: Literal["euler", "heun", "dopri5", "sde_euler", "sde_heun"] = Field(
        default="heun", description="steps of equal length; dopri5 asks the model 6 times a step"
    )
    steps: int = Field(default=50, ge=1, description="from noise to data")
    shift: float = Field(
        default=1.0, gt=0, description="of the steps' times, as objective.shift; ODE alone"
    )
    strength: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="share of the steps that are taken, by the ODE alone: below 1 they begin with "
        "the samples' source_latents, else their latents, as noisy as then (arXiv 2108.01073)",
    )
    guidance: float = Field(
        default=1.0, ge=0, description="w: uncond + w (cond - uncond); 1: the condition alone"
    )
    diffusion: Literal["sigma", "sbdm", "linear", "constant"] = Field(
        default="sigma", description="sde: what noise is added as t goes on (SiT, section 2.4)"
    )
    last_step: float = Field(
        default=0.04, gt=0, lt=1, description="sde: the last of t, which is denoised at once"
    )


class DiffusionModelConfig(BaseModel):
    """Which model to build, where its weights come from and what of it trains."""

    model_config = ConfigDict(extra="forbid")

    family: Family = Field(default="sit", description="architecture: " + ", ".join(DENOISERS))
    sit: SiTConfig = Field(default_factory=SiTConfig, description="of family sit")
    path: Path | None = Field(
        default=None,
        description="sit: weights in the official layout, .pt or .safetensors; wan: a folder of "
        "diffusers' transformer, whose config.json is the model's shape",
    )
    init: Literal["pretrained", "random"] = Field(
        default="random", description="pretrained: weights are read from path; random: from seed"
    )
    seed: int = Field(default=0, ge=0, description="of random weights; the same on any ranks")
    freeze: list[str] = Field(default_factory=list, description="parts that do not train")
    compile: Literal["auto", "none", "layers"] = Field(
        default="auto", description="layers: torch.compile each block; auto: on CUDA"
    )

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        parts = DENOISERS[self.family].parts
        for part in self.freeze:
            if part not in parts:
                raise ValueError(
                    f"model.freeze: must name parts of the model ({', '.join(parts)}), got {part}; "
                    "leave it out"
                )
        if set(parts) <= set(self.freeze):
            raise ValueError("model.freeze: must leave a part to train, got all; name fewer")
        if self.init == "pretrained" and self.path is None:
            raise ValueError("model.path: must be given with model.init=pretrained, got nothing")
        return self

    def check_path(self) -> None:
        """Raise ValueError unless `path` has what says a Wan's shape; called before anything heavy
        is imported."""
        if self.family == "wan" and (
            self.path is None or not (self.path / "config.json").is_file()
        ):
            raise ValueError(
                f"model.path: must be a folder with the config.json of a Wan transformer, got "
                f"{self.path}; name the folder `transformer` of a model in diffusers' layout"
            )

    @property
    def num_classes(self) -> int | None:
        """Of labels; None for a model of texts."""
        return self.sit.num_classes if self.family == "sit" else None
