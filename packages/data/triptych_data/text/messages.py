"""Records' messages in the form a model's chat template reads them in."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from triptych_data.text.template import ChatTemplate, Message

_THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
_OURS = ("train", "weight")
_PROBE, _PROBE_NAME = "probe", "probe_name"  # unlikely in a template


class MessageForms:
    """How one template wants contents, calls and reasoning: found out by asking it, when needed."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._content: Literal["text", "parts", "either"] | None = None
        self._empty: Any = _PROBE
        self._arguments: Literal["text", "object", "either"] | None = None

    def prepare(
        self, messages: Sequence[Message], tools: Sequence[Any] | None
    ) -> list[dict[str, Any]]:
        """Return messages as the template expects them: no keys of ours, media parts bare.

        A content becomes a list of one part, or a text of all its parts joined, for a template
        that knows only that. `<think>…</think>` before an assistant's answer becomes its
        reasoning_content where the template reads that and prints the same.

        Raises ValueError for arguments of calls that are not what the template needs.
        """
        prepared = [self._prepare(message, number) for number, message in enumerate(messages)]
        if "reasoning_content" not in self._template.source:
            return prepared
        split = [_split_thought(message) for message in prepared]
        if split == prepared:
            return prepared
        same = self._template.render(split, tools) == self._template.render(prepared, tools)
        return split if same else prepared

    def _prepare(self, message: Message, number: int) -> dict[str, Any]:
        kept = {key: value for key, value in message.items() if key not in _OURS}
        content = kept.get("content")
        if content:
            kept["content"] = self._content_of(content)
        if kept.get("tool_calls"):
            if not content:
                kept["content"] = self._empty_content()
            kept["tool_calls"] = [
                self._call(call, f"messages[{number}].tool_calls[{i}]")
                for i, call in enumerate(kept["tool_calls"])
            ]
        return kept

    def _content_of(self, content: Any) -> Any:
        form = self._content_form()
        if isinstance(content, str):
            return [{"type": "text", "text": content}] if form == "parts" else content
        if form == "text" and all(part["type"] == "text" for part in content):
            return "".join(part["text"] for part in content)
        return [_bare(part) for part in content]

    def _content_form(self) -> Literal["text", "parts", "either"]:
        if self._content is None:
            text = self._print({"role": "user", "content": _PROBE})
            parts = self._print({"role": "user", "content": [{"type": "text", "text": _PROBE}]})
            # A template that expects no parts may print them as JSON: only the same text is right.
            self._content = "either" if text == parts else "text" if text else "parts"
        return self._content

    def _call(self, call: Any, where: str) -> dict[str, Any]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(
                f'{where}: must be {{"type": "function", "function": {{"name": …, "arguments": …}}'
                f"}}, got {str(call)[:80]}; correct it"
            )
        function = {**function, "arguments": self._arguments_of(function, where)}
        if "function" not in call:
            return function
        return {"type": "function", **call, "function": function}

    def _arguments_of(self, function: Mapping[str, Any], where: str) -> Any:
        arguments = function.get("arguments", {})
        form = self._arguments_form()
        if isinstance(arguments, str) and form == "object":
            try:
                arguments = json.loads(arguments)
            except ValueError as error:
                raise ValueError(
                    f"{where}.arguments: must be JSON, got {error}; correct it"
                ) from error
        elif not isinstance(arguments, str) and form == "text":
            arguments = json.dumps(arguments, ensure_ascii=False)
        return arguments

    def _empty_content(self) -> str | None:
        """A call's content when it says nothing: some templates ask for null, some print it."""
        if self._empty == _PROBE:
            null_only = self._prints_call(None) and not self._prints_call("")
            self._empty = None if null_only else ""
        return self._empty

    def _arguments_form(self) -> Literal["text", "object", "either"]:
        """What template code can do with arguments: print text, or write an object as JSON."""
        if self._arguments is None:
            empty = self._empty_content()
            text = self._ask(json.dumps({_PROBE: _PROBE}), empty)
            takes_text = text is not None and f'\\"{_PROBE}' not in text
            takes_object = self._ask({_PROBE: _PROBE}, empty) is not None
            both = takes_text and takes_object
            self._arguments = "either" if both else "text" if takes_text else "object"
        return self._arguments

    def _prints_call(self, content: str | None) -> bool:
        return bool(self._ask({}, content) or self._ask("{}", content))

    def _ask(self, arguments: Any, content: str | None) -> str | None:
        """Print one call; None if the template fails or leaves it out."""
        call = {
            "id": "probe0000",
            "type": "function",
            "function": {"name": _PROBE_NAME, "arguments": arguments},
        }
        question = self._content_of("a")
        message = {"role": "assistant", "content": content, "tool_calls": [call]}
        return self._print({"role": "user", "content": question}, message, expected=_PROBE_NAME)

    def _print(self, *messages: Message, expected: str = _PROBE) -> str | None:
        try:
            rendered = self._template.render(messages, None)
        except ValueError:
            return None
        return rendered if expected in rendered else None


def is_trained(message: Message, where: str) -> bool:
    """Whether an assistant's message asks to be trained: `"train": false` or `"weight": 0` do not.

    Raises ValueError for any other value.
    """
    train, weight = message.get("train", True), message.get("weight", 1)
    if not isinstance(train, bool):
        raise ValueError(f"{where}.train: must be true or false, got {train!r}; correct it")
    if weight not in (0, 1):
        raise ValueError(f"{where}.weight: must be 0 or 1, got {weight!r}; correct it")
    return train and bool(weight)


def _bare(part: Mapping[str, Any]) -> dict[str, Any]:
    """A part without its index: templates ask for the type, or whether a key is there."""
    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    if part["type"] == "audio":  # Aero's asks for the key
        return {"type": "audio", "audio": None}
    return {"type": part["type"]}


def _split_thought(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if (
        message.get("role") != "assistant"
        or not isinstance(content, str)
        or message.get("reasoning_content") is not None
    ):
        return message
    thought = _THOUGHT.fullmatch(content)
    if thought is None:
        return message
    return {**message, "reasoning_content": thought[1], "content": thought[2]}
