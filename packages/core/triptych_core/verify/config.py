"""What `--verify` looks at. Imports no torch."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class VerifyConfig(BaseModel):
    """Checks of this configuration on its first rows, before the long run."""

    model_config = ConfigDict(extra="forbid", validate_default=True)

    only: bool = Field(
        False, description="check, write run.dir/verify.html and stop; --verify sets it"
    )
    rows: int = Field(2, ge=1, description="packed rows that are compared document by document")
    documents: int = Field(4, ge=1, description="documents of a row that are computed alone")
    samples: int = Field(12, ge=0, description="samples shown with what of them is trained on")
    max_window: int = Field(
        64, ge=1, description="rows of a step up to which every rank computes all of them"
    )
