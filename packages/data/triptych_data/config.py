"""The data part of a stage's configuration; it imports neither torch nor numpy."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from triptych_data.media.config import JpegConfig, VideoConfig
from triptych_data.reading_config import (
    BadRate,
    NumWorkers,
    Remote,
    ResumeAnyway,
    Seed,
    Timeout,
)
from triptych_data.storage.remote_config import RemoteConfig
from triptych_data.text.chat_config import ChatConfig

# A pixel count below one 2x2 patch pair cannot be an image; the exact floor depends on the model.
Pixels = Annotated[int, Field(ge=16)]

# Overrides name a source within a dotted path.
SourceName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]

# A weight for the whole run, or [[point, weight], …] for one that changes during it.
Weight = float | list[tuple[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=0)]]]


class SourceConfig(BaseModel):
    """Shards that are mixed with those of other sources."""

    model_config = ConfigDict(extra="forbid")

    shards: list[str] = Field(
        min_length=1, description="Tar shards, folders of shards, globs, brace ranges or URLs."
    )
    weight: Weight | None = Field(
        default=None,
        description="Share of this source relative to the others' (all have one, or none), or "
        "[[point, weight], …] for a share that changes linearly from point to point of the run; "
        "null: as large as the source is.",
    )
    repeat: float = Field(
        default=1.0,
        gt=0,
        le=10_000,
        description="Times that an epoch holds each sample; for sources without weight.",
    )
    epochs: float | None = Field(
        default=None,
        gt=0,
        le=1e9,
        description="Passes over this source after which the others go on without it; null: any.",
    )

    @property
    def weights(self) -> list[tuple[int, float]] | None:
        """The weight as points in ascending order."""
        return [(0, self.weight)] if isinstance(self.weight, int | float) else self.weight


class CostConfig(BaseModel):
    """What packs cost relative to each other, so that ranks get packs that cost alike.

    A document of l tokens, m of them targets, costs l·(l + linear) + m·target, an image or video
    frame of p patches vision·p·(p + vision_linear), a frame of a recording audio. Stages take what
    their model computes unless something is named here. The defaults are those of a 2B model:
    Qwen3-VL-2B's decoder has 28 layers of width 2048, its vision tower 24 of width 1024 (see
    `balance.Cost`).
    """

    model_config = ConfigDict(extra="forbid")

    linear: int = Field(
        default=12 * 2048, ge=0, description="12 times the width of the language model."
    )
    vision: float = Field(
        default=0.857,
        ge=0,
        le=1000,
        description="2 · width · layers of the vision tower / (width · layers of the language "
        "model); 0: images cost nothing.",
    )
    vision_linear: int = Field(
        default=6 * 1024, ge=0, description="6 times the width of the vision tower."
    )
    target: int = Field(
        default=0, ge=0, description="Rows of the output layer / layers of the language model."
    )
    audio: int = Field(default=0, ge=0, description="What a frame of a recording costs.")

    def stated(self) -> dict[str, Any]:
        """By name, as plans knew it before there was sound where there is none."""
        return self.model_dump(mode="json", exclude=None if self.audio else {"audio"})


class DataConfig(BaseModel):
    """What is read, how long a pack is, and how many processes prepare packs."""

    model_config = ConfigDict(extra="forbid")

    shards: list[str] | None = Field(
        default=None,
        min_length=1,
        description="Tar shards, folders of shards, globs, brace ranges or URLs: the short form of "
        "one source.",
    )
    sources: dict[SourceName, SourceConfig] = Field(
        default_factory=dict,
        description="Named sources to mix, instead of data.shards: {shards, weight, repeat, "
        "epochs} each. Without weights every epoch holds all samples of all sources.",
    )
    temperature: float | None = Field(
        default=None,
        ge=0.1,
        description="Weigh sources by size^(1/temperature), instead of weights of their own: "
        "1 in proportion to size, high values alike; null: epochs, or the sources' weights.",
    )
    weights_in: Literal["samples", "tokens"] = Field(
        default="samples",
        description="What weights are shares of, and what counts the points at which they change.",
    )
    seq_len: int = Field(
        ge=8, le=2**21, description="Tokens in every pack (T of a batch), padding included."
    )
    min_pixels: Pixels | None = Field(
        default=None,
        description="Smaller images are enlarged to this many pixels; null: as model.path says.",
    )
    max_pixels: Pixels | None = Field(
        default=None,
        description="Larger images are shrunk to this many pixels; null: as model.path says.",
    )
    video: VideoConfig = Field(
        default_factory=VideoConfig,
        description="How videos are sampled, {fps, max_frames, max_pixels, frame_pixels}, if not "
        "as model.path says.",
    )
    jpeg: JpegConfig | None = Field(
        default=None,
        description="Images in training compressed again at random: {share, quality, seed}.",
    )
    chat: ChatConfig = Field(
        default_factory=ChatConfig,
        description="Which turns are trained, and what the chat template is told.",
    )
    num_workers: NumWorkers = Field(
        default=2, description="Processes per rank that decode and pack; 0 works inline."
    )
    prefetch: int = Field(
        default=2,
        ge=1,
        le=64,
        description="Batches each worker prepares ahead of the training loop.",
    )
    seed: Seed = Field(default=0, description="Seed of every epoch's order of samples.")
    window: int | None = Field(
        default=None,
        ge=64,
        le=2**20,
        description="Samples packed together; more waste less padding and take longer to plan; "
        "null: 8192 to 131072, as make 6000 packs; with weights at most an eighth of all.",
    )
    max_patches: int | None = Field(
        default=None,
        ge=1,
        le=2**22,
        description="Most image patches in a pack, to bound the vision tower's memory; null: any.",
    )
    max_images: int | None = Field(
        default=None,
        ge=1,
        le=2**14,
        description="Most images and video frames in a pack; null: any.",
    )
    balance_group: int = Field(
        default=32,
        ge=1,
        le=4096,
        description="Packs of alike cost that follow each other, a power of two; four times the "
        "data ranks balances them well, 1 gives packs in random order.",
    )
    cost: CostConfig = Field(
        default_factory=CostConfig, description="What balance_group takes for a pack's cost."
    )
    long_samples: Literal["refuse", "skip"] = Field(
        default="refuse",
        description="Whether a sample that no pack can hold stops the run or is left out; plain "
        "documents are cut instead.",
    )

    remote: Remote = Field(default_factory=RemoteConfig)
    max_bad_rate: BadRate = 0.01
    timeout_s: Timeout = 600.0
    ledger: bool = Field(
        default=False,
        description="Write which samples each rank consumed at every step: run.dir/ledger.",
    )
    resume_anyway: ResumeAnyway = False

    @property
    def named_sources(self) -> dict[str, SourceConfig]:
        """The sources by name; data.shards is one named "shards"."""
        return self.sources or {"shards": SourceConfig(shards=self.shards or [])}

    @model_validator(mode="after")
    def _check_sources(self) -> "DataConfig":
        if (self.shards is None) == (not self.sources):
            got = "neither" if self.shards is None else "both"
            raise ValueError(
                f"data.shards: must be given, or data.sources instead, got {got}; give one of them"
            )
        sources = self.named_sources
        weighted = [name for name, source in sources.items() if source.weight is not None]
        if weighted and len(weighted) < len(sources):
            name = next(name for name in sources if name not in weighted)
            raise ValueError(
                f"data.sources.{name}.weight: must be given as for {weighted[0]}, got null; "
                "give every source a weight, or none"
            )
        if weighted and self.temperature is not None:
            raise ValueError(
                f"data.temperature: must be null with weights, got {self.temperature} and "
                f"data.sources.{weighted[0]}.weight; drop one of them"
            )
        for name, source in sources.items():
            _check_source(f"data.sources.{name}", source)
        return self

    @model_validator(mode="after")
    def _check_group(self) -> "DataConfig":
        if self.balance_group & (self.balance_group - 1):
            raise ValueError(
                f"data.balance_group: must be a power of two, got {self.balance_group}; "
                f"take {1 << self.balance_group.bit_length()}"
            )
        return self

    @model_validator(mode="after")
    def _check_pixels(self) -> "DataConfig":
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise ValueError(
                f"data.min_pixels: must not exceed data.max_pixels, got {self.min_pixels} > "
                f"{self.max_pixels}; swap or drop one of them"
            )
        return self


def _check_source(path: str, source: SourceConfig) -> None:
    if source.weight is None:
        return
    if source.repeat != 1:
        raise ValueError(
            f"{path}.repeat: must be 1 for a source with a weight, got {source.repeat}; "
            "multiply the weight instead"
        )
    points = [at for at, _ in source.weights or []]
    if not points or points != sorted(set(points)):
        raise ValueError(
            f"{path}.weight: must be [[point, weight], …] with ascending points, got "
            f"{source.weight}; sort the points"
        )
    if not all(0 <= weight < float("inf") for _, weight in source.weights or []):
        raise ValueError(
            f"{path}.weight: must be finite and not negative, got {source.weight}; change it"
        )
