"""What a plan assumes. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class PlanConfig(BaseModel):
    """The machine and the rows that memory and time are planned for."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

    show: Literal["no", "table", "json"] = Field(
        "no", description="print the plan and stop; --plan and --plan --json set it"
    )
    ranks: int | None = Field(
        None, ge=1, description="data-parallel ranks; by default those of the launch"
    )
    device: Literal["H100", "H200"] = Field("H100", description="whose speed is assumed")
    gpu_memory_gib: float | None = Field(
        None, gt=0, description="of one device; by default what it has, or 79.1 where there is none"
    )
    headroom: float = Field(
        0.06,
        ge=0,
        lt=1,
        description="share of the device left free: CUDA's context, libraries, fragmentation",
    )
    document_len: int = Field(1024, ge=1, description="tokens of a document in the planned row")
    image_share: float = Field(
        0.5, ge=0, le=1, description="of the row's tokens, those that stand for images"
    )
    target_share: float = Field(
        1.0, ge=0, le=1, description="of the row's other tokens, those the loss is taken of"
    )
    image_tokens: int = Field(256, ge=1, description="tokens an image")
    audio_share: float = Field(
        0.25,
        ge=0,
        le=1,
        description="of the row's tokens, those of recordings, where a model hears",
    )
    audio_seconds: float = Field(30.0, ge=0.1, description="most seconds of a recording")
