"""What a sample is: an OpenAI-style chat whose media parts point at media, and its rules.

Or a document, `{"text": …}` without messages: text, every token of which is learnt, or a list of
text and media parts as a message has it.

Two forms of one thing. *Input* (a line of JSONL) names media by path, `file://` or `data:` URI,
in one of several spellings; *shard* form, which everything after `triptych-data shard` sees, names
them by number: `{"type": "video", "index": i}` is the member `<key>.<i>.<ext>` beside the JSON.
In both `"sound": true` in a video's part says that its sound is heard, too.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from triptych_data.strict_json import load_json
from triptych_data.tools import check_tools

ROLES = ("system", "user", "assistant", "tool")
KINDS = ("image", "video", "audio")
"""Kinds of media, as parts name them; an index counts into this."""
PLACEHOLDERS = {"<image>": "images", "<video>": "videos", "<audio>": "audios"}
"""In a message whose content is a string each stands for the next of the record's list."""
SOURCE_KEYS = {
    "image": "image",
    "image_url": "image",
    "video": "video",
    "video_url": "video",
    "audio": "audio",
    "audio_url": "audio",
    "input_audio": "audio",
}
"""An input part's type, which is also the key of its source, to its kind of media."""
_PLACEHOLDER = re.compile("(" + "|".join(PLACEHOLDERS) + ")")


@dataclass(frozen=True, slots=True)
class RawSample:
    """One sample as read from a shard, undecoded.

    `json` is in shard form, `media[i]` the bytes of the member `<key>.<i>.<ext>`, and `where`
    ("shard-000000.tar: sample 000000123") is what error messages begin with.
    """

    key: str
    where: str
    json: dict[str, Any]
    media: list[bytes]


@dataclass(frozen=True, slots=True)
class InputSample:
    """One validated input record: `json` in shard form, `media[i]` the path or URI of medium i
    and its kind."""

    json: dict[str, Any]
    media: list[tuple[str, str]]


def is_document(record: dict[str, Any]) -> bool:
    """Whether a record is a text instead of a chat."""
    return "text" in record and "messages" not in record


def parse_input(line: str | bytes, where: str) -> InputSample:
    """One line of input JSONL, validated and brought into shard form. Raises as `parse_record`."""
    record = load_json(line, where)
    if not isinstance(record, dict):
        raise ValueError(
            f"{where}: a record must be a JSON object, got {_short(record)}; "
            'write {"messages": […]} or {"text": "…"}'
        )
    return parse_record(record, where)


def parse_record(record: dict[str, Any], where: str) -> InputSample:
    """One input record, validated and brought into shard form; the record itself is changed.

    Media are `{"type": "image", "image": "path"}` or `{"type": "image_url", "image_url": {"url":
    "path"}}`, the same with video or audio, OpenAI's `{"type": "input_audio", "input_audio":
    {"data": base64, "format": "wav"}}`, or `<image>`, `<video>`, `<audio>` inside string contents
    with lists of paths "images", "videos", "audios" beside `messages` (as many placeholders as
    paths). `text` of a document is what a message's content is; without such lists a string is all
    text. Keys we do not know are kept. Raises ValueError.
    """
    lists = {name: record.pop(name) for name in PLACEHOLDERS.values() if name in record}
    listed = {name: paths for name, paths in lists.items() if paths is not None}
    media: list[tuple[str, str]] = []
    document = is_document(record)
    messages = [{"content": record["text"]}] if document else record.get("messages")
    if listed:
        _check_lists(listed, where)
        messages = _number_placeholders(messages, listed, media, where)
    else:
        messages = _number_parts(messages, media, where)
    if document:
        record["text"] = messages[0]["content"]
    else:
        record["messages"] = messages
    check_sample(record, len(media), where)
    return InputSample(record, media)


def check_sample(record: Any, num_media: int, where: str) -> None:
    """Raise ValueError unless `record` is a chat in shard form that uses each of its media, or a
    document."""
    if not isinstance(record, dict):
        raise ValueError(
            f"{where}: a sample must be a JSON object, got {_short(record)}; "
            'write {"messages": […]} or {"text": "…"}'
        )
    if is_document(record):
        _check_document(record["text"], num_media, where)
        _check_media_use(record, num_media, where)
        return
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError(
            f"{where}: messages must be a non-empty list, got {_short(messages)}; "
            "leave out records without a chat"
        )
    for position, message in enumerate(messages):
        _check_message(message, num_media, f"{where}: messages[{position}]")
    roles = [message["role"] for message in messages]
    first = next((role for role in roles if role != "system"), None)
    if first != "user":
        raise ValueError(
            f"{where}: the first message after system must be from user, got {first!r}; "
            "a chat template needs a user turn to answer"
        )
    if "assistant" not in roles:
        raise ValueError(
            f"{where}: messages must hold an assistant turn, got roles {roles}; "
            "without one the sample has no target"
        )
    check_tools(record, where)
    _check_media_use(record, num_media, where)


def media_parts(record: dict[str, Any]) -> list[tuple[str, int]]:
    """Kind and media index of each media part of a sample in shard form, in the text's order."""
    return [
        (part["type"], part["index"])
        for message in _contents(record)
        for part in content_parts(message)
        if part["type"] in KINDS
    ]


def heard_parts(record: dict[str, Any]) -> list[bool]:
    """Of each media part, in the text's order, whether it is a video whose sound is heard."""
    return [
        part["type"] == "video" and part.get("sound", False)
        for message in _contents(record)
        for part in content_parts(message)
        if part["type"] in KINDS
    ]


def hear_videos(record: dict[str, Any]) -> None:
    """Let the sound of a sample's videos be heard where their parts do not say."""
    for message in _contents(record):
        for part in content_parts(message):
            if part["type"] == "video":
                part.setdefault("sound", True)


def media_kinds(record: dict[str, Any]) -> list[str]:
    """The kind of each of a checked chat's media, in the order of their numbers."""
    return [kind for _, kind in sorted({(index, kind) for kind, index in media_parts(record)})]


def content_parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    """A message's content as parts: a string is one text part, none is no part."""
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return content or []


def text_bytes(record: dict[str, Any]) -> int:
    """UTF-8 bytes of all text in a sample in shard form, tools and their calls as JSON."""
    contents = _contents(record)
    quoted = [record.get("tools"), *(message.get("tool_calls") for message in contents)]
    total = sum(len(dump_json(value)) for value in quoted if value)
    return total + sum(
        len(part["text"].encode())
        for message in contents
        for part in content_parts(message)
        if part["type"] == "text"
    )


def _contents(record: dict[str, Any]) -> list[dict[str, Any]]:
    """What has content: the messages of a chat, a document by itself."""
    return [{"content": record["text"]}] if is_document(record) else record["messages"]


def dump_json(record: dict[str, Any]) -> bytes:
    """The bytes a shard stores for `record`: compact UTF-8, keys in the record's own order."""
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()


def _check_document(text: Any, num_media: int, where: str) -> None:
    for position, part in enumerate(text if isinstance(text, list) else ()):
        _check_part(part, num_media, f"{where}: text[{position}]")
    parts = content_parts({"content": text}) if isinstance(text, str | list) else []
    if not any(part["type"] == "text" and part["text"].strip() for part in parts):
        raise ValueError(
            f"{where}: text must be a document's text, got {_short(text)}; "
            "leave out records that say nothing"
        )


def _check_media_use(record: dict[str, Any], num_media: int, where: str) -> None:
    parts = media_parts(record)
    unused = sorted(set(range(num_media)) - {index for _, index in parts})
    if unused:
        raise ValueError(
            f"{where}: every medium must be used in the text, got no part for number {unused[0]}; "
            "add its placeholder or part, or leave the file out"
        )
    kinds: dict[int, str] = {}
    for kind, index in parts:
        if kinds.setdefault(index, kind) != kind:
            raise ValueError(
                f"{where}: a medium must be of one kind, got number {index} as {kinds[index]} and "
                f"as {kind}; fix the index of a part"
            )


def _check_lists(listed: dict[str, Any], where: str) -> None:
    for name, paths in listed.items():
        if not isinstance(paths, list) or not all(isinstance(source, str) for source in paths):
            raise ValueError(
                f"{where}: {name} must be a list of paths, got {_short(paths)}; "
                f'write "{name}": ["…", …], one for each <{name[:-1]}>'
            )


def _number_placeholders(
    messages: Any, listed: dict[str, Any], media: list[tuple[str, str]], where: str
) -> Any:
    """Placeholders in strings become numbered parts, `media` gets the sources as they are met."""
    if not isinstance(messages, list):
        return messages  # check_sample says what is wrong
    sources = {name: iter(paths) for name, paths in listed.items()}
    numbered, found = [], dict.fromkeys(PLACEHOLDERS, 0)
    for position, message in enumerate(messages):
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list) and any(_source_key(part) for part in content):
            raise ValueError(
                f"{where}: messages[{position}] must not hold media parts beside a list of "
                f"{' and '.join(listed)}, got both; name each file once, in a part or in a list"
            )
        if isinstance(content, str) and _PLACEHOLDER.search(content):
            for name in _PLACEHOLDER.findall(content):
                found[name] += 1
            message = {**message, "content": _split(content, sources, media)}
        numbered.append(message)
    for placeholder, name in PLACEHOLDERS.items():
        if found[placeholder] != len(listed.get(name, ())):
            raise ValueError(
                f"{where}: messages must hold one {placeholder} for each of {name}, got "
                f"{found[placeholder]} placeholders and {len(listed.get(name, ()))} {name}; "
                "add what is missing"
            )
    return numbered


def _split(
    content: str, sources: dict[str, Iterator[str]], media: list[tuple[str, str]]
) -> list[dict[str, Any]]:
    """Text around placeholders, kept to the letter, and media parts numbered on from `media`."""
    parts: list[dict[str, Any]] = []
    for text in _PLACEHOLDER.split(content):
        if text in PLACEHOLDERS:
            kind = text[1:-1]
            source = next(sources.get(PLACEHOLDERS[text], iter(())), "")  # numbers are checked next
            parts.append({"type": kind, "index": len(media)})
            media.append((kind, source))
        elif text:
            parts.append({"type": "text", "text": text})
    return parts


def _number_parts(messages: Any, media: list[tuple[str, str]], where: str) -> Any:
    """Media parts that name a source become numbered parts; `media` gets kinds and sources."""
    if not isinstance(messages, list):
        return messages
    numbered = []
    for position, message in enumerate(messages):
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list):
            spot = f"{where}: messages[{position}].content"
            parts = [_number_part(part, media, f"{spot}[{i}]") for i, part in enumerate(content)]
            message = {**message, "content": parts}
        numbered.append(message)
    return numbered


def _number_part(part: Any, media: list[tuple[str, str]], where: str) -> Any:
    key = _source_key(part)
    if key is None:
        return part
    kind, source = SOURCE_KEYS[key], part.get(key)
    if isinstance(source, dict):
        source = _inline_audio(source) if key == "input_audio" else source.get("url")
    if not isinstance(source, str) or not source:
        raise ValueError(
            f"{where}: a part of type {key} must name its file, got {_short(part)}; write "
            f'{{"type": "{kind}", "{kind}": "path"}} or '
            f'{{"type": "{kind}_url", "{kind}_url": {{"url": "path"}}}}'
        )
    media.append((kind, source))
    kept = {name: value for name, value in part.items() if name not in ("type", key)}
    return {"type": kind, "index": len(media) - 1, **kept}


def _inline_audio(source: dict[str, Any]) -> str | None:
    """OpenAI's {"data": base64, "format": "wav"} as a `data:` URI."""
    data = source.get("data")
    if not isinstance(data, str) or not data:
        return None
    return f"data:audio/{source.get('format', 'wav')};base64,{data}"


def _source_key(part: Any) -> str | None:
    """Under which key an input media part names its source; None for any other part."""
    kind = part.get("type") if isinstance(part, dict) else None
    return kind if isinstance(kind, str) and kind in SOURCE_KEYS else None


def _check_message(message: Any, num_media: int, where: str) -> None:
    if not isinstance(message, dict):
        raise ValueError(
            f'{where} must be an object, got {_short(message)}; write {{"role": …, "content": …}}'
        )
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"{where}.role must be one of {', '.join(ROLES)}, got {role!r}; rename it")
    if isinstance(content, str):
        if found := _PLACEHOLDER.search(content):
            raise ValueError(
                f"{where}.content must not hold {found[0]} without its file, got "
                f'{_short(content)}; list the file in "{PLACEHOLDERS[found[0]]}", or, if the '
                'literal text is meant, write a {"type": "text"} part'
            )
    elif isinstance(content, list):
        for position, part in enumerate(content):
            _check_part(part, num_media, f"{where}.content[{position}]")
    elif content is not None or not message.get("tool_calls"):
        raise ValueError(
            f"{where}.content must be text or a list of parts, got {_short(content)}; "
            "leave out turns without content"
        )
    if role == "assistant" and not message.get("tool_calls") and not _has_content(message):
        raise ValueError(
            f"{where}.content must not be empty for assistant, got {_short(content)}; "
            "leave out turns that say nothing: the model would learn to"
        )


def _check_part(part: Any, num_media: int, where: str) -> None:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise ValueError(
                f"{where}.text must be a string, got {_short(part.get('text'))}; "
                'write {"type": "text", "text": "…"}'
            )
    elif isinstance(kind, str) and kind in KINDS:
        index = part.get("index")
        if type(index) is not int or not 0 <= index < num_media:
            raise ValueError(
                f"{where}.index must number one of the sample's {num_media} media from 0, "
                f"got {_short(index)}; add the {kind} or fix the index"
            )
        if kind == "video" and not isinstance(sound := part.get("sound", False), bool):
            raise ValueError(
                f"{where}.sound must be true or false, got {_short(sound)}; say whether the "
                "video's sound is heard, too"
            )
    else:
        raise ValueError(
            f"{where}.type must be text, {', '.join(KINDS[:-1])} or {KINDS[-1]}, "
            f"got {_short(part if kind is None else kind)}; write text as a string or a text part"
        )


def _has_content(message: dict[str, Any]) -> bool:
    return any(part["type"] != "text" or part["text"].strip() for part in content_parts(message))


def _short(value: Any) -> str:
    """`value` for an error message: its repr, cut so that a line stays readable."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
