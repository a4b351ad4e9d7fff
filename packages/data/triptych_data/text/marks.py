"""Marks around what a chat quotes, so that it is known again in the text a template makes of it."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from triptych_data.text.template import END, END_GENERATION, GENERATION, START, Message

Kind = Literal["content", "reasoning", "call", "tool", "other"]

_FIRST_NUMBER = 0x100000  # the last plane's private-use characters up to U+10EFFF number the texts
_MOST_TEXTS = 0xF000
RESERVED = re.compile("[\U0010f000-\U0010ffff]")
"""What no text of a chat may hold: marks, and the characters that stand for control tokens."""
RESERVED_TEXT = (
    "text must not contain the private-use characters U+10F000 to U+10FFFF, got one; remove it"
)

_MARK = re.compile(f"{START}(.)|[{END}{GENERATION}{END_GENERATION}]", re.DOTALL)


class Text(NamedTuple):
    """A quoted text: whose it is (a message's number, -1 for the tools'), what for, its letters."""

    message: int
    kind: Kind
    core: str = ""


class Span(NamedTuple):
    """A stretch `[begin, end)` of a rendered chat that quotes text `number`."""

    begin: int
    end: int
    number: int


class Rendering(NamedTuple):
    """A rendered chat without its marks: `spans` quote, the rest the template made."""

    text: str
    spans: list[Span]
    generations: list[tuple[int, int]]


class MarkedChat(NamedTuple):
    """Messages and tools with marks in them, and what each numbered mark stands for."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    texts: list[Text]


def mark_chat(
    messages: Sequence[Message], tools: Sequence[Any] | None, is_risky: Callable[[str], bool]
) -> MarkedChat:
    """Put marks around the texts of a chat.

    Contents, reasoning, names and arguments of calls, and names of tools always get them; what
    else there is (schemas, ids) only where `is_risky`: templates compare such strings. Blanks
    around a text stay outside its marks, so that a template that trims it finds them.
    """
    marker = _Marker(is_risky)
    marked_tools = None if tools is None else [marker.tool(tool) for tool in tools]
    marked = [marker.message(number, message) for number, message in enumerate(messages)]
    return MarkedChat(marked, marked_tools, marker.texts)


def read_marks(marked: str) -> Rendering | None:
    """Return the rendering that a marked text stands for; None if marks do not pair up."""
    pieces: list[str] = []
    spans: list[Span] = []
    generations: list[tuple[int, int]] = []
    at, length = 0, 0  # in the marked text, and without marks
    opened: tuple[int, int] | None = None
    generation: int | None = None
    for mark in _MARK.finditer(marked):
        pieces.append(marked[at : mark.start()])
        length += mark.start() - at
        at = mark.end()
        kind = mark[0][0]
        if kind == START and opened is None:
            opened = length, ord(mark[1]) - _FIRST_NUMBER
        elif kind == END and opened is not None:
            spans.append(Span(opened[0], length, opened[1]))
            opened = None
        elif kind == GENERATION and opened is None and generation is None:
            generation = length
        elif kind == END_GENERATION and opened is None and generation is not None:
            generations.append((generation, length))
            generation = None
        else:
            return None
    if opened is not None or generation is not None:
        return None
    pieces.append(marked[at:])
    return Rendering("".join(pieces), spans, generations)


def changed_texts(chat: MarkedChat, rendering: Rendering) -> Iterator[Text]:
    """Yield texts that a rendering holds otherwise than to the letter, or as within JSON."""
    for begin, end, number in rendering.spans:
        text, printed = chat.texts[number], rendering.text[begin:end]
        if printed != text.core and printed != json.dumps(text.core, ensure_ascii=False)[1:-1]:
            yield text


class _Marker:
    def __init__(self, is_risky: Callable[[str], bool]) -> None:
        self.texts: list[Text] = []
        self._is_risky = is_risky

    def message(self, number: int, message: Message) -> dict[str, Any]:
        marked = {}
        for key, value in message.items():
            if key == "content":
                marked[key] = self._content(value, number)
            elif key in ("reasoning_content", "reasoning", "thinking"):
                marked[key] = self._all(value, Text(number, "reasoning"))
            elif key == "tool_calls" and isinstance(value, list):
                marked[key] = [self._call(call, number) for call in value]
            else:
                marked[key] = self._risky(value, number)
        return marked

    def tool(self, tool: Any) -> Any:
        if not isinstance(tool, Mapping):
            return self._risky(tool, -1)
        return {
            self._key(key, -1): self._wrap(value, Text(-1, "tool"))
            if key == "name" and isinstance(value, str)
            else self.tool(value)
            if key == "function"
            else self._risky(value, -1)
            for key, value in tool.items()
        }

    def _content(self, content: Any, number: int) -> Any:
        if not isinstance(content, list):
            return self._all(content, Text(number, "content"))
        return [
            {
                key: self._wrap(value, Text(number, "content"))
                if key == "text" and isinstance(value, str)
                else self._risky(value, number)
                for key, value in part.items()
            }
            for part in content
        ]

    def _call(self, call: Any, number: int) -> Any:
        if not isinstance(call, Mapping):
            return self._all(call, Text(number, "call"))
        return {
            self._key(key, number): self._call(value, number)
            if key == "function"
            else self._all(value, Text(number, "call"))
            if key in ("name", "arguments")
            else self._risky(value, number)
            for key, value in call.items()
        }

    def _all(self, value: Any, text: Text) -> Any:
        if isinstance(value, str):
            return self._wrap(value, text)
        if isinstance(value, Mapping):
            return {
                self._key(key, text.message): self._all(item, text) for key, item in value.items()
            }
        if isinstance(value, list):
            return [self._all(item, text) for item in value]
        return value

    def _risky(self, value: Any, number: int) -> Any:
        if isinstance(value, str):
            return self._key(value, number)
        if isinstance(value, Mapping):
            return {self._key(k, number): self._risky(item, number) for k, item in value.items()}
        if isinstance(value, list):
            return [self._risky(item, number) for item in value]
        return value

    def _key(self, key: str, number: int) -> str:
        return self._wrap(key, Text(number, "other")) if self._is_risky(key) else key

    def _wrap(self, text: str, meaning: Text) -> str:
        core = text.strip()
        if not core:
            return text
        if len(self.texts) == _MOST_TEXTS:
            raise ValueError(f"a chat must hold at most {_MOST_TEXTS} texts; cut it in two")
        number = chr(_FIRST_NUMBER + len(self.texts))
        self.texts.append(meaning._replace(core=core))
        begin = len(text) - len(text.lstrip())
        end = begin + len(core)
        return f"{text[:begin]}{START}{number}{core}{END}{text[end:]}"
