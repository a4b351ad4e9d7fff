"""What `--replay` looks at. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class ReplayConfig(BaseModel):
    """One step of a run once more, without its update."""

    model_config = ConfigDict(extra="forbid", validate_default=True)

    step: Literal["no", "last"] | Annotated[int, Field(ge=1)] = Field(
        "no",
        description="a step whose batch is run again; last: the newest in skipped.jsonl; "
        "--replay [STEP] sets it",
    )
    weights: Literal["exact", "nearest", "model"] | Path = Field(
        "exact",
        description="exact: those the step had: of the newest checkpoint before it, and the steps "
        "from there taken again; nearest: of that checkpoint, or the next, as they are; model: of "
        "model.path; or a checkpoint's folder",
    )
