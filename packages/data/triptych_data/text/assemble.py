"""A rendered chat, its controls and media put together as one text to encode, and taken apart."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from triptych_data.text.controls import Controls
from triptych_data.text.encoder import CLOSE, FIRST_CONTROL_ID, OPEN, OPEN_ID
from triptych_data.text.turns import LocatedChat, Turn


class ChatTokens(NamedTuple):
    """A tokenised chat: `input_ids (L,) int64`, and `trained (L,) bool` where a loss is taken."""

    input_ids: np.ndarray
    trained: np.ndarray


class MediaTokens(NamedTuple):
    """What takes the place of a medium's placeholder token: in turns template text, which may
    hold control tokens, and how often the kind's own token is repeated, or that of another kind."""

    kind: str
    pieces: tuple[str | int | tuple[str, int], ...]


class Assembly(NamedTuple):
    """Text to encode, and what each of the anchors in it stands for."""

    anchored: str
    controls: list["AnchoredControl"]


class AnchoredControl(NamedTuple):
    """An id, how often, whether it is trained, and whether the text after it is."""

    id: int
    times: int
    train: bool
    train_after: bool


def assemble(
    chat: LocatedChat, trained: Collection[int], media: Sequence[MediaTokens], controls: Controls
) -> Assembly:
    """Put anchors for the control tokens that the template printed, media for placeholders, and
    borders around what is trained.

    A medium and the special tokens right beside it are never trained. Raises ValueError unless
    the chat has a placeholder for each of `media`, in their order.
    """
    builder = _Builder(controls, media)
    for piece in _pieces(chat):
        train = piece.turn is not None and piece.turn.message in trained
        if piece.opens:
            builder.border(train)
        if piece.quoted:
            builder.text(piece.text, train)
        else:
            builder.template_text(piece.text, train)
    return builder.finish()


def assemble_document(
    pieces: Iterable[tuple[str, bool]], media: Sequence[MediaTokens], controls: Controls
) -> Assembly:
    """Put texts (True), all trained, and what the template prints of media (False) together."""
    builder = _Builder(controls, media)
    for text, quoted in pieces:
        if quoted:
            builder.text(text, True)
        else:
            builder.template_text(text, False)
    return builder.finish()


def disassemble(encoded: np.ndarray, assembly: Assembly) -> ChatTokens:
    """Turn what an encoder made of `assembly.anchored` into the chat's tokens."""
    ids: list[np.ndarray] = []
    trained: list[np.ndarray] = []
    start, train = 0, False
    controls = iter(assembly.controls)

    def add(chunk: np.ndarray, train: bool) -> None:
        ids.append(chunk)
        trained.append(np.full(len(chunk), train))

    for at in np.flatnonzero(encoded < 0).tolist():
        add(encoded[start:at], train)
        start = at + 1
        if encoded[at] > FIRST_CONTROL_ID:
            train = bool(encoded[at] == OPEN_ID)
        else:
            control = next(controls)
            add(np.full(control.times, control.id, dtype=np.int64), control.train)
            train = control.train_after
    add(encoded[start:], train)
    assert next(controls, None) is None  # as many anchors came back
    return ChatTokens(np.concatenate(ids), np.concatenate(trained))


class _Piece(NamedTuple):
    text: str
    quoted: bool
    turn: Turn | None
    opens: bool  # begins a turn


def _pieces(chat: LocatedChat) -> Iterator[_Piece]:
    """The text in the largest pieces that are all quoted or not, and all of one turn or none."""
    text, spans, _ = chat.rendering
    edges = {0, len(text)}
    edges.update(edge for span in spans for edge in span[:2])
    edges.update(edge for turn in chat.turns for edge in (turn.begin, turn.end))
    next_span, next_turn = 0, 0
    for begin, end in pairwise(sorted(edges)):
        while next_span < len(spans) and spans[next_span].end <= begin:
            next_span += 1
        while next_turn < len(chat.turns) and chat.turns[next_turn].end <= begin:
            next_turn += 1
        quoted = next_span < len(spans) and spans[next_span].begin <= begin
        turn = chat.turns[next_turn] if next_turn < len(chat.turns) else None
        if turn is not None and turn.begin > begin:
            turn = None
        yield _Piece(text[begin:end], quoted, turn, turn is not None and turn.begin == begin)


class _Builder:
    def __init__(self, controls: Controls, media: Sequence[MediaTokens]) -> None:
        self._controls = controls
        self._media = media
        self._found: list[str] = []
        self._out: list[str] = []
        self._anchored: list[AnchoredControl] = []
        self._training = False
        self._after_control = False

    def border(self, train: bool) -> None:
        """A border even where nothing changes, so that ids do not depend on what is trained."""
        self._out.append(OPEN if train else CLOSE)
        self._training, self._after_control = train, False

    def text(self, text: str, train: bool) -> None:
        if train != self._training:
            if self._after_control:  # no border: a control token may take blanks after it
                self._anchored[-1] = self._anchored[-1]._replace(train_after=train)
                self._training = train
            else:
                self.border(train)
        self._out.append(text)
        self._after_control = False

    def template_text(self, text: str, train: bool) -> None:
        parts = self._controls.pattern.split(text)
        for i, part in enumerate(parts):
            if i % 2 == 0:
                if part:
                    self.text(part, train)
            elif part in self._controls.placeholders:
                self._medium(part)
            else:
                self._control(part, 1, train and not self._wraps_a_medium(parts, i))

    def finish(self) -> Assembly:
        expected = [tokens.kind for tokens in self._media]
        if self._found != expected:
            raise ValueError(
                "the chat template must print one placeholder per medium, got "
                f"{self._found or 'none'} for {expected or 'none'}; use a template that supports "
                "them"
            )
        return Assembly("".join(self._out), self._anchored)

    def _medium(self, placeholder: str) -> None:
        kind = self._controls.placeholders[placeholder]
        self._found.append(kind)
        number = len(self._found) - 1
        for piece in self._media[number].pieces if number < len(self._media) else ():
            if isinstance(piece, str):
                self.template_text(piece, False)
            elif isinstance(piece, tuple):
                self._control(self._controls.names[piece[0]], piece[1], False)
            else:
                token = self._controls.media_ids.get(kind, self._controls.ids[placeholder])
                self._control(placeholder, piece, False, token)

    def _control(self, token: str, count: int, train: bool, number: int | None = None) -> None:
        self._out.append(self._controls.anchors[token])
        number = self._controls.ids[token] if number is None else number
        self._anchored.append(AnchoredControl(number, count, train, self._training))
        self._after_control = True

    def _wraps_a_medium(self, parts: Sequence[str], i: int) -> bool:
        beside = [
            parts[j]
            for j, gap in ((i - 2, i - 1), (i + 2, i + 1))
            if 0 <= j < len(parts) and not parts[gap]
        ]
        return any(part in self._controls.placeholders for part in beside)
