"""How videos are sampled and images are varied: parts of the data configuration, without torch."""

from pydantic import BaseModel, ConfigDict, Field, model_validator


class VideoConfig(BaseModel):
    """What replaces the model folder's own rules for videos; null keeps those."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fps: float | None = Field(
        default=None, gt=0, le=240, description="Frames taken per second of a video."
    )
    max_frames: int | None = Field(
        default=None, ge=1, description="Most frames of a video; longer ones are seen less often."
    )
    max_pixels: int | None = Field(
        default=None,
        ge=16,
        description="Most pixels of all frames of a video together; more are shrunk (of a "
        "Qwen2.5-VL no frame below the model's least).",
    )
    frame_pixels: tuple[int, int] | None = Field(
        default=None,
        description="Least and most pixels of a frame, of a model whose videos are one grid "
        "(Qwen2.5-VL, Qwen-Omni).",
    )

    sound: bool = Field(
        default=True,
        description='Whether the sound of videos is heard where a part says `"sound": true`.',
    )

    @model_validator(mode="after")
    def _check_frame_pixels(self) -> "VideoConfig":
        low, high = self.frame_pixels or (1, 1)
        if not 1 <= low <= high:
            raise ValueError(
                "data.video.frame_pixels: must be two positive numbers in order, got "
                f"{low}, {high}; give the least first"
            )
        return self


class JpegConfig(BaseModel):
    """Random JPEG quality: images are compressed again now and then, as they are on the web."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    share: float = Field(default=0.5, gt=0, le=1, description="Share of images compressed again.")
    quality: tuple[int, int] = Field(
        default=(30, 95), description="Lowest and highest quality, 1 to 100, drawn evenly."
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed of the draws.")

    @model_validator(mode="after")
    def _check_quality(self) -> "JpegConfig":
        low, high = self.quality
        if not 1 <= low <= high <= 100:
            raise ValueError(
                "data.jpeg.quality: must be two numbers from 1 to 100 in order, got "
                f"{low}, {high}; give the lowest first"
            )
        return self
