"""What a stage's YAML says about images to be drawn. Imports no torch."""

from pydantic import BaseModel, ConfigDict, Field


class DrawConfig(BaseModel):
    """Documents that are words and the latents of an image, to be learnt by rectified flow."""

    model_config = ConfigDict(extra="forbid")

    text_len: int = Field(default=128, ge=1, description="tokens of an image's words, cut to these")
    text_dropout: float = Field(
        default=0.1, ge=0, le=1, description="how often the words are left out, for guidance"
    )
    prompts: list[str] = Field(
        default_factory=list, description="words of what every evaluation draws, for the report"
    )
    steps: int = Field(default=25, ge=1, description="from noise to such an image")
    guidance: float = Field(default=4.0, ge=0, description="of such an image by its words; 1: none")
    reach: float = Field(default=2.0, gt=0, description="the latent value that is shown as white")
    weight: float = Field(
        default=1.0,
        ge=0,
        description="of the latents' mean loss beside that of tokens; 0 measures it alone, with "
        "model.freeze=[generation]",
    )
