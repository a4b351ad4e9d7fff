"""Where in a rendered chat the assistant's turns lie: what a model would have to generate."""

import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from triptych_data.text.marks import (
    RESERVED,
    RESERVED_TEXT,
    MarkedChat,
    Rendering,
    Span,
    changed_texts,
    mark_chat,
    read_marks,
)
from triptych_data.text.template import END_GENERATION, GENERATION, ChatTemplate, Message

_GENERATIONS = re.compile(f"[{GENERATION}{END_GENERATION}]")
_REMEMBERED = 4096  # surroundings of turns; templates make a dozen


class Turn(NamedTuple):
    """What message `message` makes the model say: `[begin, end)`, its stop token included.

    A template with generation blocks may cut a turn in several; the last of them holds `stop`.
    """

    message: int
    begin: int
    end: int
    stop: str


class LocatedChat(NamedTuple):
    """A rendered chat and its assistant's turns, in the order of the text."""

    rendering: Rendering
    turns: list[Turn]


class TurnFinder:
    """Renders chats by one template and finds the turns.

    A turn begins where the template's generation prompt ends and ends after the first token that
    matches `stops`. Generation blocks, if the template has them, say instead where it begins.
    """

    def __init__(
        self, template: ChatTemplate, stops: re.Pattern[str], is_risky: Callable[[str], bool]
    ) -> None:
        self._template = template
        self._stops = stops
        self._is_risky = is_risky
        self._prompt_ends: dict[tuple[Any, ...], int] = {}
        self._own_stops: dict[tuple[Any, ...], str | None] = {}

    def stop_token(self, messages: Sequence[Message]) -> str:
        """Return the token that ends the last of `messages`, an assistant's.

        Raises ValueError if there is none.
        """
        chat = mark_chat(messages, None, self._is_risky)
        rendering = self._read(self._render(chat, len(messages), add_generation_prompt=False))
        last = len(messages) - 1
        self._check_all_printed(chat, rendering, {last})
        return self._find_stop(last, _spans_of(last, chat, rendering)[-1].end, rendering)[0]

    def locate(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
        trained: Collection[int],
        *,
        add_generation_prompt: bool = False,
    ) -> LocatedChat:
        """Render a chat and find its turns; those of messages not in `trained` if they can be.

        Raises ValueError if the template refuses the chat, changes or drops a text of it, or
        writes a trained turn into the history otherwise than a model generates it.
        """
        plain = self._template.render(messages, tools, add_generation_prompt=add_generation_prompt)
        if RESERVED.search(plain):
            raise ValueError(f"message {RESERVED_TEXT}")
        chat = mark_chat(messages, tools, self._is_risky)
        marked = self._render(chat, len(messages), add_generation_prompt)
        rendering = read_marks(marked)
        if rendering is None or rendering.text != plain:
            raise self._cut(self._find_cut(messages, tools, plain, add_generation_prompt))
        for text in changed_texts(chat, rendering):
            raise self._cut(text.message)
        self._check_all_printed(chat, rendering, trained)
        find = self._generated if self._template.has_generation else self._prompted
        turns = []
        for number, message in enumerate(messages):
            own = _spans_of(number, chat, rendering)
            if message["role"] != "assistant" or not own:
                continue
            try:
                turns += find(number, own, chat, rendering, marked)
            except ValueError:
                if number in trained:
                    raise
        return LocatedChat(rendering, sorted(turns, key=lambda turn: turn.begin))

    def _render(self, chat: MarkedChat, count: int, add_generation_prompt: bool) -> str:
        return self._template.render(
            chat.messages[:count],
            chat.tools,
            add_generation_prompt=add_generation_prompt,
            mark_generations=True,
        )

    def _find_cut(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
        plain: str,
        add_generation_prompt: bool,
    ) -> int:
        """The first message in which marks alone change what the template prints; -1: the tools."""
        for number in range(len(messages)):
            chat = mark_chat(messages[number : number + 1], None, self._is_risky)
            mixed = [*messages[:number], *chat.messages, *messages[number + 1 :]]
            try:
                marked = self._template.render(
                    mixed, tools, add_generation_prompt=add_generation_prompt, mark_generations=True
                )
                rendering = read_marks(marked)
            except ValueError:
                rendering = None
            if rendering is None or rendering.text != plain:
                return number
        return -1

    def _cut(self, message: int) -> ValueError:
        whose = f"messages[{message}]" if message >= 0 else "the tools"
        return self._error(
            f"must print every message's text in one piece, got that of {whose} cut or changed; "
            "it may treat some words of it (such as </think>) specially: use a template that does "
            "not, or write reasoning as reasoning_content and calls as tool_calls"
        )

    def _check_all_printed(
        self, chat: MarkedChat, rendering: Rendering, trained: Collection[int]
    ) -> None:
        printed = Counter(span.number for span in rendering.spans)
        for number, (message, kind, _) in enumerate(chat.texts):
            if kind in ("content", "call") and not printed[number]:
                raise self._error(
                    f"must print every text, got none of messages[{message}]'s "
                    f"{'tool_calls' if kind == 'call' else kind}; use a template that knows them"
                )
            if kind == "reasoning" and not printed[number] and message in trained:
                raise self._error(
                    f"must print the reasoning of a turn that is trained, got it dropped from "
                    f"messages[{message}]; if it is that of former turns which the template "
                    "drops, train the last turn only (data.chat.train_turns=last, or "
                    '"train": false in the message) or make each turn a record of its own'
                )
            if kind in ("content", "reasoning") and printed[number] > 1 and message in trained:
                raise self._error(
                    f"must print a trained text once, got that of messages[{message}] repeated; "
                    "use another template"
                )
        tools = {number for number, text in enumerate(chat.texts) if text.kind == "tool"}
        if tools and not any(printed[number] for number in tools):
            raise self._error(
                "must print the record's tools, got none of them; use a template that knows tools"
            )

    def _generated(
        self, number: int, own: list[Span], chat: MarkedChat, rendering: Rendering, marked: str
    ) -> list[Turn]:
        """The generation blocks around a message's texts, the last cut or grown to its stop.

        What a block holds of the generation prompt is not the model's to say, and left out.
        """
        blocks = [
            block for block in rendering.generations if any(_within(span, block) for span in own)
        ]
        if not all(any(_within(span, block) for block in blocks) for span in own):
            raise self._error(
                f"must hold each assistant text in a generation block, got one of "
                f"messages[{number}] outside; correct the blocks"
            )
        stop = self._find_stop(number, own[-1].end, rendering)
        after = rendering.text[blocks[-1][1] : stop.start()]
        if after.strip():
            raise self._error(
                f"must end a generation block with the stop token or before it, got {after!r} "
                f"between in messages[{number}]; correct the blocks"
            )
        begins = [begin for begin, _ in blocks]
        with suppress(ValueError):  # where no prompt is like it, the blocks alone say
            begins[0] = max(begins[0], self._prompt_end(number, own, chat, rendering, marked))
        ends = [*(end for _, end in blocks[:-1]), stop.end()]
        return [Turn(number, begin, end, stop[0]) for begin, end in zip(begins, ends, strict=True)]

    def _prompted(
        self, number: int, own: list[Span], chat: MarkedChat, rendering: Rendering, marked: str
    ) -> list[Turn]:
        """From the generation prompt's end to the stop token that a model would have to say."""
        first, last = own[0].begin, own[-1].end
        within = [span.number for span in rendering.spans if first < span.begin < last]
        if any(chat.texts[other].message != number for other in within):
            raise self._error(
                f"must print a turn in one piece, got other texts within messages[{number}]"
            )
        begin = self._prompt_end(number, own, chat, rendering, marked)
        stop = self._find_stop(number, last, rendering)
        if number + 1 < len(chat.messages):
            self._check_stop(number, stop[0], rendering.text[last : stop.end()], chat)
        return [Turn(number, begin, stop.end(), stop[0])]

    def _prompt_end(
        self, number: int, own: list[Span], chat: MarkedChat, rendering: Rendering, marked: str
    ) -> int:
        """Where the generation prompt ends before a message, asked once for each surrounding."""
        first = own[0].begin
        before = max((span.end for span in rendering.spans if span.end <= first), default=0)
        key = rendering.text[before:first], chat.tools is None
        if key not in self._prompt_ends:
            offset = self._find_prompt_end(number, before, first, chat, marked) - before
            _remember(self._prompt_ends, key, offset)
        return before + self._prompt_ends[key]

    def _find_prompt_end(
        self, number: int, before: int, first: int, chat: MarkedChat, marked: str
    ) -> int:
        prompt = self._render(chat, number, add_generation_prompt=True)
        rendering = self._read(prompt)
        if not _GENERATIONS.sub("", marked).startswith(_GENERATIONS.sub("", prompt)):
            raise self._error(
                f"must print messages[{number}] after the prompt it makes for generating it, got "
                f"another than {rendering.text[-40:]!r}: the model would learn what it is never "
                "asked; train the last turn only (data.chat.train_turns=last), set a variable "
                "such as data.chat.variables.enable_thinking, or take a consistent template"
            )
        if not before <= len(rendering.text) <= first:
            raise self._error(
                f"must end its generation prompt before messages[{number}]'s text, got "
                f"{rendering.text[-40:]!r}; use another template"
            )
        return len(rendering.text)

    def _find_stop(self, number: int, last: int, rendering: Rendering) -> re.Match[str]:
        following = min((s.begin for s in rendering.spans if s.begin >= last), default=None)
        limit = len(rendering.text) if following is None else following
        stop = self._stops.search(rendering.text, last, limit)
        if stop is None:
            raise self._error(
                f"must print a special token after an assistant's text, got none after "
                f"messages[{number}]; without it the model cannot learn to stop"
            )
        return stop

    def _check_stop(self, number: int, stop: str, ending: str, chat: MarkedChat) -> None:
        """A turn inside the history must end as the model ended it when it was the last."""
        key = ending, chat.tools is None
        if key not in self._own_stops:
            rendering = self._read(self._render(chat, number + 1, add_generation_prompt=False))
            own = _spans_of(number, chat, rendering)
            found = self._find_stop(number, own[-1].end, rendering)[0] if own else None
            _remember(self._own_stops, key, found)
        if self._own_stops[key] != stop:
            raise self._error(
                f"must end messages[{number}] as a model generates it, with "
                f"{self._own_stops[key]}, got {stop} in the history; train the last turn only "
                "(data.chat.train_turns=last)"
            )

    def _read(self, marked: str) -> Rendering:
        rendering = read_marks(marked)
        if rendering is None:
            raise self._error(
                "must print every message's text in one piece, got one cut when the chat ends "
                "earlier; use another template"
            )
        return rendering

    def _error(self, text: str) -> ValueError:
        return ValueError(f"{self._template.where}: the chat template {text}")


def _spans_of(number: int, chat: MarkedChat, rendering: Rendering) -> list[Span]:
    """A message's texts where they are printed first: results of a call may repeat its name."""
    first: dict[int, Span] = {}
    for span in rendering.spans:
        if chat.texts[span.number].message == number:
            first.setdefault(span.number, span)
    return list(first.values())


def _within(span: Span, block: tuple[int, int]) -> bool:
    return block[0] <= span.begin and span.end <= block[1]


def _remember(memory: dict[tuple[Any, ...], Any], key: tuple[Any, ...], value: Any) -> None:
    if len(memory) == _REMEMBERED:
        memory.clear()
    memory[key] = value
