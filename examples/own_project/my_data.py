"""A dataset of one's own: sums such as `12+7=19`, made on the fly, a byte a token.

An iterator of batches is all that the loop asks for, with `state_dict` and `load_state_dict`. Here
a batch is a function of (seed, its number, rank), so that one integer is the whole state.
"""

import random
from collections.abc import Iterator
from typing import Any, Self

import torch
from pydantic import BaseModel, ConfigDict, Field

END = 10  # a line feed ends a document


class SumsConfig(BaseModel):
    """What the YAML says about the data."""

    model_config = ConfigDict(extra="forbid")

    seq_len: int = Field(128, ge=8, description="tokens a row")
    largest: int = Field(9, ge=1, description="summand")
    seed: int = 0


class Sums:
    """Endless packed rows for one rank."""

    def __init__(self, config: SumsConfig, *, rank: int, world_size: int) -> None:
        self._config, self._rank, self._world_size = config, rank, world_size
        self._step = 0  # batches that every rank has been given

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            self._step += 1
            yield self._row((self._step - 1) * self._world_size + self._rank)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self._step * self._world_size, **self._config.model_dump()}

    def load_state_dict(self, state: dict[str, Any]) -> Self:
        rows = state["rows"]
        if state != {"rows": rows, **self._config.model_dump()}:
            raise ValueError(f"data: must be what the checkpoint says, got {self._config}")
        self._step = rows // self._world_size
        return self

    def _row(self, number: int) -> dict[str, Any]:
        """Whole documents, and a tail of padding, which is a document without targets."""
        draw = random.Random(f"{self._config.seed} {number}")
        ids: list[int] = []
        labels: list[int] = []
        lengths: list[int] = []
        while True:
            a, b = (draw.randrange(self._config.largest + 1) for _ in range(2))
            text = f"{a}+{b}={a + b}".encode()
            asked = text.index(b"=")
            if len(ids) + len(text) >= self._config.seq_len:
                break
            ids += text
            # The target of token t is token t + 1; of the question there are none.
            labels += [-100] * asked + [*text[asked + 1 :], END]
            lengths.append(len(text))
        tail = self._config.seq_len - len(ids)
        lengths.append(tail)
        offsets = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return {
            "input_ids": torch.tensor([ids + [0] * tail]),
            "shift_labels": torch.tensor([labels + [-100] * tail]),
            "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
            "cu_seqlens": offsets,
            "max_seqlen": self._config.seq_len,
            "num_targets": sum(label != -100 for label in labels),
            "num_tokens": len(ids),
            "sample_keys": [f"row-{number}"],
        }
