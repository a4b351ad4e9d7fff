"""From the columns of any row to a sample: which hold messages, prompt, answer, media, text."""

import datetime
import decimal
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from triptych_data.sample import KINDS, PLACEHOLDERS, SOURCE_KEYS, load_json
from triptych_data.sources.source import Row

MESSAGES = ("messages", "conversations", "conversation")
CAPTIONS = ("caption", "text")
TEXT = "text"
"""Usual names of the columns that a user need not name; text is a document where no media are."""
USUAL = {kind: (kind, f"{kind}s") for kind in KINDS}
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "observation": "tool",
}
BLOB = "\0"
"""A source that begins so counts into the row's own bytes; no file's name can."""
FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, slots=True)
class Mapping:
    """Which columns make a sample. None and empty: found by their usual names.

    Either `messages`, a column of OpenAI's or ShareGPT's turns, or `response` with `prompt` or
    `prompt_template`, whose {fields} are columns; or `text`, a column of documents. `media` names
    columns by kind (`sample.KINDS`).
    """

    messages: str | None = None
    prompt: str | None = None
    response: str | None = None
    system: str | None = None
    prompt_template: str | None = None
    text: str | None = None
    media: dict[str, tuple[str, ...]] = field(default_factory=dict)
    drop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        pieces = (self.prompt, self.response, self.system, self.prompt_template)
        if self.messages and any(pieces):
            raise ValueError(
                "--messages: must stand alone, got it beside --prompt, --response, --system or "
                "--prompt-template; a row has one or the other"
            )
        if self.text and (self.messages or any(pieces)):
            raise ValueError(
                "--text: must stand alone, got it beside --messages, --prompt, --response, "
                "--system or --prompt-template; a row is a document or a chat"
            )
        if self.prompt and self.prompt_template:
            raise ValueError(
                "--prompt: must not come with --prompt-template, got both; write {column} in the "
                "template"
            )
        if any(pieces) and not self.response and not self.prompt_template:
            raise ValueError("--response: must name the answer's column, got none; add it")


def to_record(row: Row, mapping: Mapping, where: str) -> tuple[Row, list[bytes]]:
    """An input record as `sample.parse_record` takes it, and the bytes its sources count into.

    Columns that are not used are kept if JSON can hold them. Raises ValueError.
    """
    chat = _Chat(dict(row), mapping, where)
    return chat.record(), chat.blobs


@dataclass(slots=True)
class _Chat:
    """One row on its way; what is used leaves `row`."""

    row: Row
    mapping: Mapping
    where: str
    blobs: list[bytes] = field(default_factory=list)

    def record(self) -> Row:
        column = self.mapping.messages or self._usual(MESSAGES)
        pieces = self.mapping.response or self.mapping.prompt_template
        text = self.mapping.text or (None if column or pieces else self._document())
        if text is not None:
            made = self._from_text(text)
        elif column and not pieces:
            made = self._from_messages(column)
        else:
            made = self._from_pieces()
        if "__key__" in self.row:
            self.row.setdefault("id", self.row.pop("__key__"))
        kept = {name: value for name, value in self.row.items() if name not in self.mapping.drop}
        return made | {
            name: _plain(value) for name, value in kept.items() if not _holds_bytes(value)
        }

    def _document(self) -> str | None:
        """The column of a document's text, unless it may be the caption of media beside it."""
        text = self.row.get(TEXT)
        media = {name for names in USUAL.values() for name in names} & self.row.keys()
        says_where = isinstance(text, list) or _has_placeholder(text)
        return self._usual((TEXT,)) if says_where or not (media or self.mapping.media) else None

    def _from_text(self, column: str) -> Row:
        text = self._value(column)
        lists = {}
        if _has_placeholder(text):
            lists = {f"{kind}s": sources for kind, sources in self._media().items() if sources}
        if isinstance(text, list):
            text = self._fill(_message({"content": text}), {})["content"]
        else:
            text = self._text(column)
        for name in (column, "text", "messages"):  # a record has one of the two, and this one
            self.row.pop(name, None)
        return {"text": text, **lists}

    def _from_messages(self, column: str) -> Row:
        messages = self._take(column)
        if isinstance(messages, str):
            messages = load_json(messages, f"{self.where}: column {column}")
        if not isinstance(messages, list):
            return {"messages": messages}  # the sample's rules say what is wrong
        messages = [_message(message) for message in messages]
        parts = [part for message in messages for part in _media_parts(message)]
        named = any("index" in part or part.get(part["type"]) is not None for part in parts)
        if named and not self.mapping.media:
            return {"messages": [self._fill(message, {}) for message in messages]}
        media = self._media()
        if not parts:
            lists = {f"{kind}s": sources for kind, sources in media.items()}
            return {"messages": messages, **{name: s for name, s in lists.items() if s}}
        counts = {kind: len(sources) for kind, sources in media.items()}
        for kind in KINDS:
            found = sum(SOURCE_KEYS[part["type"]] == kind for part in parts)
            if found != counts.get(kind, 0):
                raise ValueError(
                    f"{self.where}: messages must hold one {kind} part for each {kind}, got "
                    f"{found} parts and {counts.get(kind, 0)} files; add what is missing, or name "
                    f"the column with --{kind}"
                )
        sources = {kind: iter(found) for kind, found in media.items()}
        return {"messages": [self._fill(message, sources) for message in messages]}

    def _from_pieces(self) -> Row:
        mapping, media = self.mapping, self._media()
        answer = mapping.response or (self._usual(CAPTIONS) if any(media.values()) else None)
        if answer is None:
            raise ValueError(
                f"{self.where}: a row must hold a chat or a document, got the columns "
                f"{', '.join(sorted(self.row)) or 'none'}; name them with --messages, or with "
                "--prompt and --response, or --image and --response for captions, or --text"
            )
        if mapping.prompt_template is not None:
            prompt = FIELD.sub(lambda found: self._text(found[1]), mapping.prompt_template)
        else:
            prompt = self._text(mapping.prompt) if mapping.prompt else ""
        messages = [{"role": "user", "content": _content(prompt, media)}]
        if mapping.system and (system := self._text(mapping.system)):
            messages.insert(0, {"role": "system", "content": system})
        messages.append({"role": "assistant", "content": self._text(answer)})
        lists = {}
        if any(placeholder in prompt for placeholder in PLACEHOLDERS):
            lists = {f"{kind}s": sources for kind, sources in media.items() if sources}
        for name in (mapping.prompt, mapping.system, answer):
            self.row.pop(name or "", None)
        return {"messages": messages, **lists}

    def _media(self) -> dict[str, list[str]]:
        """The sources of each kind, from the columns named or of the usual names."""
        media = {}
        for kind, usual in USUAL.items():
            columns = self.mapping.media.get(kind) or [name for name in usual if name in self.row]
            media[kind] = [s for name in columns for s in self._sources(self._take(name), name)]
        return media

    def _sources(self, value: Any, column: str) -> list[str]:
        if isinstance(value, str) and value.startswith("["):  # a list in CSV
            value = load_json(value, f"{self.where}: column {column}")
        if value is None or value == "":
            return []
        if isinstance(value, list):
            return [source for item in value for source in self._sources(item, column)]
        if _is_media_struct(value):
            inside = value.get("bytes")
            value = value.get("path") if inside is None else inside
        if isinstance(value, bytes):
            self.blobs.append(value)
            return [f"{BLOB}{len(self.blobs) - 1}"]
        if isinstance(value, str) and not value.startswith(BLOB):
            return [value]
        raise ValueError(
            f"{self.where}: column {column} must hold paths or bytes of media, got "
            f"{repr(value)[:80]}; store encoded files, not decoded arrays"
        )

    def _fill(self, message: Any, sources: dict[str, Iterator[str]]) -> Row:
        """A turn whose media parts name their sources; those without one get the next of theirs."""
        if not _media_parts(message):
            return message
        return message | {"content": [self._filled(part, sources) for part in message["content"]]}

    def _filled(self, part: Any, sources: dict[str, Iterator[str]]) -> Any:
        if not _is_media(part):
            return part
        kind, source = SOURCE_KEYS[part["type"]], part.get(part["type"])
        if isinstance(source, bytes) or _is_media_struct(source):
            return part | {part["type"]: next(iter(self._sources(source, "of messages")), "")}
        if source is not None:
            return part
        if "index" not in part:
            return {"type": kind, kind: next(sources.get(kind, iter(())), "")}
        names = [name for name in self.row if name.partition(".")[0] == str(part["index"])]
        if len(names) != 1:
            raise ValueError(
                f"{self.where}: a {kind} part's index must number one member, got "
                f"{part['index']!r} and {names}; name the members <key>.<index>.<ext>"
            )
        [source] = self._sources(self.row[names[0]], names[0])
        return {"type": kind, kind: source}

    def _text(self, column: str) -> str:
        value = self._value(column)
        if isinstance(value, bool) or not isinstance(value, str | int | float | None):
            raise ValueError(
                f"{self.where}: column {column} must hold text, got {repr(value)[:80]}; "
                "name a column of text"
            )
        return "" if value is None else str(value)

    def _take(self, column: str) -> Any:
        value = self._value(column)
        del self.row[column]
        return value

    def _value(self, column: str) -> Any:
        if column not in self.row:
            raise ValueError(
                f"{self.where}: a row must have the column {column}, got "
                f"{', '.join(sorted(self.row)) or 'none'}; name one of these"
            )
        return self.row[column]

    def _usual(self, names: tuple[str, ...]) -> str | None:
        return next((name for name in names if self.row.get(name) is not None), None)


def _content(prompt: str, media: dict[str, list[str]]) -> Any:
    """A user's turn: media first, then the prompt, unless that says where they belong."""
    parts: list[Row] = [
        {"type": kind, kind: source} for kind, sources in media.items() for source in sources
    ]
    if not parts or any(placeholder in prompt for placeholder in PLACEHOLDERS):
        return prompt
    return [*parts, {"type": "text", "text": prompt}] if prompt else parts


def _message(message: Any) -> Any:
    """A turn in OpenAI's spelling; fields that a table fills with null are not there."""
    if not isinstance(message, dict):
        return message
    message = {name: value for name, value in message.items() if value is not None}
    if "role" not in message and "from" in message and "value" in message:
        role = message.pop("from")
        role = SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
        message = {"role": role, "content": message.pop("value"), **message}
    content = message.get("content")
    if isinstance(content, list):
        message["content"] = [
            {name: value for name, value in part.items() if value is not None}
            if isinstance(part, dict)
            else part
            for part in content
        ]
    return message


def _has_placeholder(text: Any) -> bool:
    return isinstance(text, str) and any(placeholder in text for placeholder in PLACEHOLDERS)


def _media_parts(message: Any) -> list[Row]:
    content = message.get("content") if isinstance(message, dict) else None
    return [part for part in content if _is_media(part)] if isinstance(content, list) else []


def _is_media(part: Any) -> bool:
    kind = part.get("type") if isinstance(part, dict) else None
    return isinstance(kind, str) and kind in SOURCE_KEYS


def _is_media_struct(value: Any) -> bool:
    """Whether `value` is what Hugging Face's datasets stores of an image, video or audio."""
    return isinstance(value, dict) and bool(value) and {"bytes", "path"} >= set(value)


def _holds_bytes(value: Any) -> bool:
    if isinstance(value, dict):
        return set(value) == {"bytes", "path"} or any(map(_holds_bytes, value.values()))
    if isinstance(value, list):
        return any(map(_holds_bytes, value))
    return isinstance(value, bytes)


def _plain(value: Any) -> Any:
    """A column's value as JSON has it: NaN is null, times and decimals are text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, datetime.date | datetime.time | decimal.Decimal):
        return str(value)
    return str(value) if isinstance(value, datetime.timedelta) else value
