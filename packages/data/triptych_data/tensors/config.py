"""The data part of a stage on latents; it imports neither torch nor numpy."""

from pathlib import Path
from typing import ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from triptych_data.reading_config import (
    BadRate,
    NumWorkers,
    Remote,
    ResumeAnyway,
    Seed,
    Timeout,
)
from triptych_data.storage.remote_config import RemoteConfig


class TensorDataConfig(BaseModel):
    """What is read, how many samples a batch has, and how many processes prepare batches."""

    model_config = ConfigDict(extra="forbid")
    KEY: ClassVar[str] = "data"
    """where in a stage's configuration it is, for messages"""

    shards: list[str] = Field(
        min_length=1,
        description="Shards that `triptych-data latents` wrote: files, folders, globs or URLs.",
    )
    batch_size: int = Field(
        ge=1, le=2**16, description="Samples of a micro-batch, on each data rank."
    )
    mean: list[float] = Field(
        default=[0.0],
        min_length=1,
        description="Latents become (x - mean) / std, and so do image_latents and source_latents; "
        "one, or a number for each channel.",
    )
    std: list[float] = Field(
        default=[1.0],
        min_length=1,
        description="5.489980785067252 for Stable Diffusion's VAE: 1 / 0.18215.",
    )
    text_len: int | None = Field(
        default=None,
        ge=1,
        le=2**16,
        description="Rows that text_features are filled up to with zeros; null: no texts.",
    )
    empty_text: Path | None = Field(
        default=None,
        description="A .safetensors file with the text_features of the empty text; null: zeros.",
    )
    features: list[str] = Field(
        default_factory=list, description="Other tensors of a sample that the model takes, by name."
    )
    text_field: str | None = Field(
        default=None, description="Field of a sample's JSON that says in words what it shows."
    )
    given_frames: int = Field(
        default=0,
        ge=0,
        description="First frames of the latents that the model is given, and does not learn.",
    )
    num_workers: NumWorkers = Field(
        default=2, description="Processes per rank that read and draw; 0 works inline."
    )
    prefetch: int = Field(
        default=2, ge=1, le=64, description="Batches each worker prepares ahead of the training."
    )
    seed: Seed = Field(
        default=0,
        description="Of every epoch's order; with sample and epoch, of a sample's noise and time.",
    )
    remote: Remote = Field(default_factory=RemoteConfig)
    max_bad_rate: BadRate = 0.01
    timeout_s: Timeout = 600.0
    resume_anyway: ResumeAnyway = False

    @model_validator(mode="after")
    def _check_std(self) -> Self:
        if not all(0 < std < float("inf") for std in self.std):
            raise ValueError(
                f"{self.KEY}.std: must be finite and above 0, got {self.std}; leave it out for 1"
            )
        return self
