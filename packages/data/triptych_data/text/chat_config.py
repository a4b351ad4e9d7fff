"""How chats are turned into tokens: a part of the data configuration, which imports no torch."""

from datetime import date as Date
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator


class ChatConfig(BaseModel):
    """Which turns are trained, and what the chat template is told beside the messages."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    train_turns: Literal["all", "last"] = Field(
        default="all",
        description="Which assistant turns are trained: all, or those since the last user's "
        'message; "train": false or "weight": 0 in a message takes it out.',
    )
    variables: dict[str, Any] = Field(
        default_factory=dict,
        description="What the chat template reads beside the messages, such as enable_thinking.",
    )
    date: str | None = Field(
        default=None,
        description="The day (YYYY-MM-DD) that a chat template prints as today; tokens must not "
        "depend on when they are made.",
    )
    fill_answer: int | None = Field(
        default=None,
        ge=1,
        description="Behind a chat's last answer its end token is repeated, and trained, until the "
        "answer takes a multiple of so many tokens: for model.diffusion, which is asked to fill "
        "masks in and must not be told by their number how long the answer is.",
    )
    tiktoken: Literal["off", "if_equal", "require"] = Field(
        default="off",
        description="Whether text is encoded by tiktoken, several times as fast, where that is "
        "installed and proven to give the same tokens.",
    )

    @field_validator("variables")
    @classmethod
    def _check_variables(cls, variables: dict[str, Any]) -> dict[str, Any]:
        ours = {"messages", "tools", "documents", "add_generation_prompt"} & set(variables)
        if ours:
            raise ValueError(
                f"data.chat.variables: must not replace what a sample gives, got {sorted(ours)}; "
                "leave them out"
            )
        return variables

    @field_validator("date")
    @classmethod
    def _check_date(cls, date: str | None) -> str | None:
        if date is not None:
            try:
                Date.fromisoformat(date)
            except ValueError as error:
                raise ValueError(
                    f"data.chat.date: must be a day as YYYY-MM-DD, got {date!r}; correct it"
                ) from error
        return date
