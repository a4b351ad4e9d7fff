"""What a stage's YAML says about its model. Imports no torch: it is validated before torch is."""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from .catalogue import FAMILIES, THINKER_OF, Part
from .foreign_config import read_foreign
from .masked_diffusion.config import FILE, DiffusionConfig, read_diffusion

# Whose layers are attention and a gated MLP alone, and so may look both ways.
BOTH_WAYS = ("qwen2", "qwen3")


class MoEConfig(BaseModel):
    """The routers' losses of a mixture of experts; each sparse layer adds its own."""

    model_config = ConfigDict(extra="forbid")

    aux_loss: float = Field(
        default=0.001,
        ge=0,
        description="times the load-balancing loss E sum f P, which is 1 when the load is even",
    )
    aux_over: Literal["document", "row"] = Field(
        default="row",
        description="whose tokens should spread evenly: those of a packed row, or of each document",
    )
    z_loss: float = Field(
        default=0.0, ge=0, description="times the mean of logsumexp(router logits)^2, e.g. 0.001"
    )
    bias_rate: float = Field(
        default=0.0,
        ge=0,
        description="how far an expert's bias, by which it is chosen, moves a step towards an even "
        "load over all ranks, e.g. 0.001; for dots1, then with aux_loss=0 or little",
    )


class LoraConfig(BaseModel):
    """Adapters beside linear layers (LoRA, DoRA), through peft; all of the base stays as it is."""

    model_config = ConfigDict(extra="forbid")

    rank: int = Field(default=16, ge=1, description="of what is added to a weight")
    alpha: float = Field(default=32.0, gt=0, description="what is added is times alpha / rank")
    dropout: float = Field(
        default=0.0, ge=0, le=0, description="0: layers that are computed again keep no generators"
    )
    targets: list[str] = Field(
        default_factory=lambda: ["language"],
        min_length=1,
        description="linear layers that get one: all of a part (vision, audio, projector, "
        "language; in a mixture its attention) but the output layer, or those whose names end in "
        "it, e.g. q_proj",
    )
    dora: bool = Field(
        default=False, description="also a magnitude for each row of a weight (arXiv 2402.09353)"
    )
    quantize: Literal["nf4"] | None = Field(
        default=None,
        description="nf4: the weights beside adapters are kept in four bits (QLoRA); needs "
        "bitsandbytes",
    )
    merge: bool = Field(
        default=True, description="also export the whole model, adapters merged into its weights"
    )


class ModelConfig(BaseModel):
    """Which model to build, where its weights come from and what of it trains."""

    model_config = ConfigDict(extra="forbid")

    family: str = Field(
        default="auto",
        description="architecture: auto (what config.json's model_type says), or one of "
        + ", ".join(FAMILIES),
    )
    path: Path = Field(description="local Hugging Face model directory (config.json, tokenizer, …)")
    init: Literal["pretrained", "random"] = Field(
        default="pretrained",
        description="pretrained: weights are read from path; random: drawn from seed",
    )
    seed: int = Field(
        default=0, ge=0, description="of random weights; the same on any number of ranks"
    )
    freeze: list[Part] = Field(
        default_factory=list,
        description="parts that do not train: vision, audio, projector, language, generation, "
        "router, experts",
    )
    moe: MoEConfig | None = Field(
        default=None, description="losses of a mixture of experts; only for a model that is one"
    )
    diffusion: DiffusionConfig | None = Field(
        default=None,
        description="train by masked diffusion instead of next tokens; for "
        + " and ".join(BOTH_WAYS),
    )
    lora: LoraConfig | None = Field(
        default=None, description="train adapters instead of the parts themselves"
    )
    compile: Literal["auto", "none", "layers"] = Field(
        default="auto",
        description="layers: torch.compile each layer on its own; auto: on CUDA, unless layers or "
        "experts are divided over ranks",
    )
    fuse: bool = Field(
        default=True,
        description="RMSNorm and SwiGLU through triptych_kernels instead of stock; not in compiled "
        "layers, where the compiler does it",
    )

    @field_validator("family")
    @classmethod
    def _check_family(cls, family: str) -> str:
        if family not in ("auto", *FAMILIES):
            raise ValueError(
                f"model.family: must be auto or one of {', '.join(FAMILIES)}, got {family}; "
                "`python -m triptych_models` says what each is"
            )
        return family

    def check_path(self, lr_by_part: Iterable[str] = ()) -> None:
        """Raise ValueError unless `path` holds a family with the parts to freeze, a part to train,
        and the parts that have a learning rate of their own.

        Called before anything heavy is imported.
        """
        if not self.path.is_dir():
            raise ValueError(
                f"model.path: must be a local Hugging Face directory, got '{self.path}'; "
                "download the model there or correct the path"
            )
        self._check_diffusion()
        parts = FAMILIES[self.find_family()].parts
        named = [("model.freeze", part) for part in self.freeze]
        for key, part in [*named, *(("optim.lr_by_part", part) for part in lr_by_part)]:
            if part not in parts:
                raise ValueError(
                    f"{key}: must name parts of the model ({', '.join(parts)}), got {part}; "
                    "leave it out"
                )
        if self.moe is not None and "experts" not in parts:
            raise ValueError(
                f"model.moe: must be left out for a model without experts, got {self.path}"
            )
        if (
            self.moe is not None
            and self.moe.bias_rate
            and not FAMILIES[self.find_family()].has_bias
        ):
            raise ValueError(
                f"model.moe.bias_rate: must be 0 for a model whose experts have no bias, got "
                f"{self.moe.bias_rate} for {self.path}; take moe.aux_loss, or make a mixture that "
                "has one by tools/upcycle_moe.py --shared-expert"
            )
        if self.moe is not None and self.moe.bias_rate and "router" in self.freeze:
            raise ValueError(
                f"model.moe.bias_rate: must be 0 with model.freeze=[router], got "
                f"{self.moe.bias_rate}; a bias is the router's"
            )
        if self.lora is not None and self.moe is not None and self.moe.bias_rate:
            raise ValueError(
                f"model.moe.bias_rate: must be 0 with model.lora, got {self.moe.bias_rate}; a "
                "router keeps its bias, as all of the base is kept"
            )
        if set(parts) <= set(self.freeze):
            raise ValueError("model.freeze: must leave a part to train, got all; name fewer")

    def _check_diffusion(self) -> None:
        if self.diffusion is not None and self.find_family() not in BOTH_WAYS:
            raise ValueError(
                f"model.diffusion: must be left out unless the family is {' or '.join(BOTH_WAYS)}, "
                f"got {self.find_family()}; take a dense model of text alone"
            )
        if self.diffusion is None and read_diffusion(self.path) is not None:
            raise ValueError(
                f"model.diffusion: must be set for a model that was trained so, got {self.path} "
                f"with a {FILE}; repeat its settings, or delete the file to train next tokens"
            )

    def find_family(self) -> str:
        """The architecture, read from config.json where `family` leaves it to that.

        Raises ValueError for a directory without one, or with one that no family is for.
        """
        if self.family != "auto":
            return self.family
        file = self.path / "config.json"
        if not file.is_file():
            raise ValueError(
                f"model.path: must hold a config.json, got {self.path}; name a model directory"
            )
        model_type = read_foreign(file).get("model_type")
        model_type = THINKER_OF.get(str(model_type), model_type)
        if model_type not in FAMILIES:
            raise ValueError(
                f"{file}: model_type must be one of {', '.join(FAMILIES)}, got {model_type}; "
                "take a model of a supported family"
            )
        return str(model_type)
