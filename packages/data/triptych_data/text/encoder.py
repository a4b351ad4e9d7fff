"""Text to token ids, where single characters stand for the control tokens a template printed."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from tokenizers import AddedToken, Tokenizer

_ANCHORS = 0x10F000  # the first of the private-use characters below
MOST_CONTROLS = 0xF00
ANY_ANCHOR = f"[{chr(_ANCHORS)}-{chr(_ANCHORS + 1 + MOST_CONTROLS)}]"
"""A pattern of all of them."""
CLOSE, OPEN = chr(_ANCHORS), chr(_ANCHORS + 1)
"""Borders of what is trained: tokens never cross them, and they leave none behind."""


def anchor(number: int) -> str:
    """The character that stands for control token `number` in anchored text."""
    return chr(_ANCHORS + 2 + number)


def anchor_id(character: str) -> int:
    """What encoders give for a border or an anchor."""
    return _ANCHORS - 1 - ord(character)


CLOSE_ID, OPEN_ID, FIRST_CONTROL_ID = -1, -2, -3
"""What encoders give for CLOSE, OPEN and anchor(0); anchor(i) is FIRST_CONTROL_ID - i."""


class TextEncoder(Protocol):
    """Encodes anchored text, in which borders and anchors are single characters."""

    def encode(self, anchored: str) -> np.ndarray:
        """Return token ids (int64), below 0 for borders and anchors."""


class HuggingFaceEncoder:
    """Encodes by a `tokenizers` backend, which it changes: give it one of its own.

    Whatever `controls` names is ordinary text from now on, wherever it stands, and an anchor is
    split off the text exactly as its control token was.

    Raises ValueError if a control token comes out of ordinary text all the same.
    """

    def __init__(self, backend: Tokenizer, controls: Sequence[AddedToken], where: str) -> None:
        if len(controls) > MOST_CONTROLS:
            raise ValueError(
                f"{where}: a tokenizer must have at most {MOST_CONTROLS} control tokens, got "
                f"{len(controls)}; it is not supported"
            )
        self._backend = backend
        self._anchors = _add_anchors(backend, controls, where)
        # Special tokens are text to a backend told to encode them; the others are made special.
        backend.add_special_tokens([AddedToken(token.content, special=True) for token in controls])
        backend.encode_special_tokens = True
        for token in controls:
            if (
                _id_of(backend, token)
                in backend.encode(token.content, add_special_tokens=False).ids
            ):
                raise ValueError(
                    f"{where}: a control token must not come out of ordinary text, got "
                    f"{token.content!r} from its letters; the tokenizer is not supported"
                )

    def encode(self, anchored: str) -> np.ndarray:
        ids = np.array(self._backend.encode(anchored, add_special_tokens=False).ids, dtype=np.int64)
        first, end = self._anchors
        return np.where((ids < first) | (ids >= end), ids, first - 1 - ids)


def _add_anchors(backend: Tokenizer, controls: Sequence[AddedToken], where: str) -> tuple[int, int]:
    """Make borders and anchors tokens, and return the range `[first, end)` of their ids."""
    borders = [AddedToken(border, normalized=False) for border in (CLOSE, OPEN)]
    anchors = [
        AddedToken(anchor(i), lstrip=token.lstrip, rstrip=token.rstrip, normalized=False)
        for i, token in enumerate(controls)
    ]
    taken = set(backend.get_vocab(with_added_tokens=True).values())
    backend.add_tokens([*borders, *anchors])
    ids = [_id_of(backend, token) for token in (*borders, *anchors)]
    first = ids[0]
    assert ids == list(range(first, first + len(ids)))
    if not taken.isdisjoint(ids):  # the library counts tokens to find a free id
        raise ValueError(
            f"{where}: a tokenizer's ids must have no holes, got {max(taken)} as the highest of "
            f"{len(taken)}; it is not supported"
        )
    return first, first + len(ids)


def _id_of(backend: Tokenizer, token: AddedToken) -> int:
    number = backend.token_to_id(token.content)
    assert number is not None  # it was added
    return number
