"""The data part of a stage on images; it imports neither torch nor numpy."""

from pydantic import BaseModel, ConfigDict, Field

from triptych_data.reading_config import (
    BadRate,
    NumWorkers,
    Remote,
    ResumeAnyway,
    Seed,
    Timeout,
)
from triptych_data.storage.remote_config import RemoteConfig


class PixelDataConfig(BaseModel):
    """What is read, how it is cut, and how many processes prepare batches."""

    model_config = ConfigDict(extra="forbid")

    shards: list[str] = Field(
        min_length=1,
        description="Shards that `triptych-data shard` wrote; every image in them is a sample.",
    )
    batch_size: int = Field(
        ge=1, le=2**16, description="Images of a micro-batch, on each data rank."
    )
    shorter_side: int | None = Field(
        default=None,
        ge=1,
        le=2**13,
        description="Pixels to which an image is resized before a square of the model's size is "
        "cut out; null: just so many.",
    )
    crop: bool = Field(
        default=True, description="Cut out anywhere; false: in the middle, as held-out images."
    )
    flip: bool = Field(default=False, description="Turn every other image left to right.")
    num_workers: NumWorkers = Field(
        default=2, description="Processes per rank that decode and draw; 0 works inline."
    )
    prefetch: int = Field(
        default=2, ge=1, le=64, description="Batches each worker prepares ahead of the training."
    )
    seed: Seed = Field(
        default=0,
        description="Of every epoch's order; with image and epoch, of its cut and noise.",
    )
    remote: Remote = Field(default_factory=RemoteConfig)
    max_bad_rate: BadRate = 0.01
    timeout_s: Timeout = 600.0
    resume_anyway: ResumeAnyway = False
