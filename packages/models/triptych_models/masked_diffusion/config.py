"""What a stage's YAML says about masked diffusion. Imports no torch."""

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ..foreign_config import read_foreign

FILE = "diffusion.json"
"""Beside the weights of a model that was trained so: stock code would take it for causal."""


class DiffusionConfig(BaseModel):
    """Masked tokens are guessed from both sides, instead of next tokens from one.

    The defaults are LLaDA's (arXiv 2502.09992). Dream's (arXiv 2508.15487), for a model that begins
    with the weights of an autoregressive one: predict=next, weight=context, divide_by=masked.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    predict: Literal["same", "next"] = Field(
        default="same",
        description="where a masked token is guessed: same: at its own position; next: at the one "
        "before it, as autoregressive models do",
    )
    weight: Literal["inverse", "context", "none"] = Field(
        default="inverse",
        description="times the loss of a masked token: inverse: 1 / p, its probability of being "
        "masked; context: how near tokens are that are not masked (CART); none: 1",
    )
    divide_by: Literal["maskable", "masked"] = Field(
        default="maskable",
        description="of the whole step what the summed loss is divided by: maskable: tokens that "
        "could have been masked, with weight=inverse a bound on the nats of a token; masked: those "
        "that were",
    )
    min_p: float = Field(
        default=1e-3,
        gt=0,
        le=1,
        description="p = min_p + (1 - min_p) t, with t uniform in [0, 1) for each document",
    )
    context_p: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="of weight=context: p (1 - p)^(d - 1) / 2 for each token at distance d",
    )
    mask_token_id: int | None = Field(
        default=None,
        ge=0,
        description="the mask; null: the embedding's last row, if no token of the tokenizer has it",
    )
    block_length: int = Field(
        default=32, ge=1, description="of answers: tokens that are filled in before the next ones"
    )
    tokens_per_step: int = Field(
        default=1,
        ge=1,
        description="of answers: the surest masked tokens of a block that a forward fills in",
    )

    def mask(self, vocab_size: int) -> int:
        """The mask's id in a model of so many; ValueError for one it does not have."""
        if self.mask_token_id is None:
            return vocab_size - 1
        if self.mask_token_id >= vocab_size:
            raise ValueError(
                f"model.diffusion.mask_token_id: must be below config.json's vocab_size "
                f"({vocab_size}), got {self.mask_token_id}; take the id of a token"
            )
        return self.mask_token_id

    def mask_of(self, directory: Path) -> int:
        """The mask's id for the model of a directory."""
        return self.mask(int(read_foreign(directory / "config.json")["vocab_size"]))

    def as_note(self, directory: Path) -> dict[str, str]:
        """`FILE` and its content, for a model that was begun from a directory."""
        note = (
            "This model was trained by masked diffusion: its attention is not causal. Stock "
            "classes load the weights, but what their generate() gives would mean nothing."
        )
        settings = self.model_copy(update={"mask_token_id": self.mask_of(directory)})
        content = {"note": note, "diffusion": settings.model_dump()}
        return {FILE: json.dumps(content, indent=2) + "\n"}


def read_diffusion(directory: Path) -> DiffusionConfig | None:
    """What a directory's model was trained with; None for an autoregressive one.

    Raises ValueError for a file that does not say it.
    """
    file = directory / FILE
    if not file.is_file():
        return None
    try:
        return DiffusionConfig.model_validate(json.loads(file.read_bytes())["diffusion"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"{file}: must hold the settings of a diffusion model, got {error!s:.200}; copy or "
            "export it again"
        ) from error
