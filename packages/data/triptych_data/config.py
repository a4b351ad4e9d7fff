"""The data part of a stage's configuration; it imports neither torch nor numpy."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

# A pixel count below one 2x2 patch pair cannot be an image; the exact floor depends on the model.
Pixels = Annotated[int, Field(ge=16)]


class DataConfig(BaseModel):
    """What is read, how long a pack is, and how many processes prepare packs."""

    model_config = ConfigDict(extra="forbid")

    shards: list[str] = Field(
        min_length=1,
        description="Tar shards, folders of shards or glob patterns; together they are one epoch.",
    )
    seq_len: int = Field(ge=8, description="Tokens in every pack (T of a batch), padding included.")
    min_pixels: Pixels | None = Field(
        default=None,
        description="Smaller images are enlarged to this many pixels; null: as model.path says.",
    )
    max_pixels: Pixels | None = Field(
        default=None,
        description="Larger images are shrunk to this many pixels; null: as model.path says.",
    )
    num_workers: int = Field(
        default=2,
        ge=0,
        le=256,
        description="Processes per rank that decode and pack; 0 works inline.",
    )
    prefetch: int = Field(
        default=2,
        ge=1,
        le=64,
        description="Batches each worker prepares ahead of the training loop.",
    )
    seed: int = Field(
        default=0, ge=0, lt=2**63, description="Seed of every epoch's order of samples."
    )
    open_bins: int = Field(
        default=16,
        ge=1,
        le=1024,
        description="Packs kept open while packing; more waste less padding and plan more slowly.",
    )
    max_patches: int | None = Field(
        default=None,
        ge=1,
        description="Most image patches in a pack, to bound the vision tower's memory; null: any.",
    )
    long_samples: Literal["refuse", "skip"] = Field(
        default="refuse",
        description="Whether a sample that no pack can hold stops the run or is left out.",
    )

    @model_validator(mode="after")
    def _check_pixels(self) -> "DataConfig":
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise ValueError(
                f"data.min_pixels: must not exceed data.max_pixels, got {self.min_pixels} > "
                f"{self.max_pixels}; swap or drop one of them"
            )
        return self
