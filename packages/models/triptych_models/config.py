"""What a stage's YAML says about its model. Imports no torch: it is validated before torch is."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Part = Literal["vision", "projector", "language"]


class ModelConfig(BaseModel):
    """Which model to build, where its weights come from and what of it trains."""

    model_config = ConfigDict(extra="forbid")

    family: Literal["qwen3_vl"] = Field(
        default="qwen3_vl", description="architecture; a key of triptych_models.families.FAMILIES"
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
        default_factory=list, description="parts that do not train: vision, projector, language"
    )
    compile: Literal["none", "layers"] = Field(
        default="none",
        description="layers: torch.compile each layer on its own (not with ZeRO-3, whose hooks "
        "inside a layer break its graph)",
    )
    fuse: bool = Field(
        default=True, description="RMSNorm and SwiGLU through triptych_kernels instead of stock"
    )

    def check_path(self) -> None:
        """Raise ValueError unless `path` is a directory, before anything heavy is imported."""
        if not self.path.is_dir():
            raise ValueError(
                f"model.path: must be a local Hugging Face directory, got '{self.path}'; "
                "download the model there or correct the path"
            )
