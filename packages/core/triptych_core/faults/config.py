"""The section `loss_guard`. Imports no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator


class LossGuardConfig(BaseModel):
    """Which updates are left out."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

    mode: Literal["off", "skip", "stop"] = Field(
        "skip",
        description="skip: a step whose loss or gradient norm is no number, or spikes, updates "
        "nothing, and skipped.jsonl names its samples; stop: the run ends at the first one; off: "
        "only what is no number is left out, and nothing is noted",
    )
    sigma: float = Field(
        12.0,
        gt=0,
        description="a spike lies so many deviations above the median of the last window: "
        "1.4826 median absolute deviations, at least 5 % of the median",
    )
    window: int = Field(128, ge=8, description="updates that were taken, by which a step is judged")
    min_steps: int = Field(
        32, ge=2, description="updates taken before spikes are looked for; numbers always are"
    )
    max_in_a_row: int = Field(
        10, ge=1, description="the run ends when so many steps in a row were left out"
    )

    @field_validator("mode", mode="before")
    @classmethod
    def _read_off(cls, value: Any) -> Any:
        return "off" if value is False else value  # as YAML reads the word
