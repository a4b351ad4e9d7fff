"""What a sample is: an OpenAI-style chat whose image parts point at media, and its rules.

Two forms of one thing. *Input* (a line of JSONL) names images by path, `file://` or `data:` URI,
in one of three spellings; *shard* form, which everything after `triptych-data shard` sees, names
them by number: `{"type": "image", "index": i}` is the member `<key>.<i>.<ext>` beside the JSON.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "user", "assistant")
PLACEHOLDER = "<image>"
"""In a message whose content is a string it stands for the next of the record's `images`."""
SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
LATER_PARTS = ("video", "video_url", "audio", "audio_url", "input_audio")


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
    """One validated input record: `json` in shard form, `images[i]` the path or URI of image i."""

    json: dict[str, Any]
    images: list[str]


def parse_input(line: str | bytes, where: str) -> InputSample:
    """One line of input JSONL, validated and brought into shard form.

    Images are `{"type": "image", "image": "path"}`, `{"type": "image_url", "image_url": {"url":
    "path"}}`, or `<image>` inside string contents with `"images": ["path", …]` beside `messages`
    (as many placeholders as paths). Keys we do not know are kept. Raises ValueError.
    """
    record = load_json(line, where)
    if not isinstance(record, dict):
        raise ValueError(
            f"{where}: a record must be a JSON object, got {_short(record)}; "
            'write {"messages": […]}'
        )
    listed = record.pop("images", None)
    images = list(_listed_images(listed, where))
    if listed is None:
        record["messages"] = _number_parts(record.get("messages"), images, where)
    else:
        record["messages"] = _number_placeholders(record.get("messages"), images, where)
    check_sample(record, len(images), where)
    return InputSample(record, images)


def check_sample(record: Any, num_media: int, where: str) -> None:
    """Raise ValueError unless `record` is a chat in shard form that uses each of its media."""
    if not isinstance(record, dict):
        raise ValueError(
            f"{where}: a sample must be a JSON object, got {_short(record)}; "
            'write {"messages": […]}'
        )
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
    unused = sorted(set(range(num_media)) - set(image_indexes(record)))
    if unused:
        raise ValueError(
            f"{where}: every image must be used in messages, got no part for image {unused[0]}; "
            "add its placeholder or part, or leave the image out"
        )


def image_indexes(record: dict[str, Any]) -> list[int]:
    """The media index of each image part of a chat in shard form, in the text's order."""
    return [
        part["index"]
        for message in record["messages"]
        if isinstance(message["content"], list)
        for part in message["content"]
        if part["type"] == "image"
    ]


def text_bytes(record: dict[str, Any]) -> int:
    """UTF-8 bytes of all text in a chat in shard form."""
    return sum(len(text.encode()) for message in record["messages"] for text in _texts(message))


def load_json(data: str | bytes, where: str) -> Any:
    """`data` as JSON. Raises ValueError, for NaN, half a surrogate pair and no UTF-8 as well."""
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
        value = json.loads(text, parse_constant=_refuse_constant)
        if SURROGATE_ESCAPE.search(text):  # only so can half a surrogate pair get in
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: must be valid JSON in UTF-8, got {error}; fix it") from error
    return value


def dump_json(record: dict[str, Any]) -> bytes:
    """The bytes a shard stores for `record`: compact UTF-8, keys in the record's own order."""
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()


def _refuse_constant(name: str) -> None:
    raise ValueError(f"the constant {name}, which JSON does not have")


def _listed_images(listed: Any, where: str) -> list[str]:
    if listed is None:
        return []
    if not isinstance(listed, list) or not all(isinstance(source, str) for source in listed):
        raise ValueError(
            f"{where}: images must be a list of paths, got {_short(listed)}; "
            'write "images": ["a.jpg", …], one for each <image>'
        )
    return listed


def _number_placeholders(messages: Any, images: list[str], where: str) -> Any:
    """`<image>` in strings become numbered parts; there must be as many as `images`."""
    if not isinstance(messages, list):
        return messages  # check_sample says what is wrong
    numbered, count = [], 0
    for position, message in enumerate(messages):
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list) and any(_source_key(part) for part in content):
            raise ValueError(
                f"{where}: messages[{position}] must not hold image parts beside a list of images, "
                "got both; name each image once, in a part or in images"
            )
        if isinstance(content, str) and PLACEHOLDER in content:
            message = {**message, "content": _split(content, count)}
            count += content.count(PLACEHOLDER)
        numbered.append(message)
    if count != len(images):
        raise ValueError(
            f"{where}: messages must hold one {PLACEHOLDER} for each of images, got {count} "
            f"placeholders and {len(images)} images; add what is missing"
        )
    return numbered


def _split(content: str, index: int) -> list[dict[str, Any]]:
    """Text around placeholders, kept to the letter, and image parts numbered from `index`."""
    parts: list[dict[str, Any]] = []
    for position, text in enumerate(content.split(PLACEHOLDER)):
        if position:
            parts.append({"type": "image", "index": index + position - 1})
        if text:
            parts.append({"type": "text", "text": text})
    return parts


def _number_parts(messages: Any, images: list[str], where: str) -> Any:
    """Image parts that name a source become numbered parts; `images` gets the sources."""
    if not isinstance(messages, list):
        return messages
    numbered = []
    for position, message in enumerate(messages):
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list):
            spot = f"{where}: messages[{position}].content"
            parts = [_number_part(part, images, f"{spot}[{i}]") for i, part in enumerate(content)]
            message = {**message, "content": parts}
        numbered.append(message)
    return numbered


def _number_part(part: Any, images: list[str], where: str) -> Any:
    key = _source_key(part)
    if key is None:
        return part
    source = part.get(key)
    if key == "image_url" and isinstance(source, dict):
        source = source.get("url")
    if not isinstance(source, str) or not source:
        raise ValueError(
            f"{where}: an image part must name its file, got {_short(part)}; write "
            '{"type": "image", "image": "a.jpg"} or '
            '{"type": "image_url", "image_url": {"url": "a.jpg"}}'
        )
    images.append(source)
    kept = {name: value for name, value in part.items() if name not in ("type", key)}
    return {"type": "image", "index": len(images) - 1, **kept}


def _source_key(part: Any) -> str | None:
    """Under which key an input image part names its source; None for any other part."""
    kind = part.get("type") if isinstance(part, dict) else None
    return kind if kind in ("image", "image_url") else None


def _check_message(message: Any, num_media: int, where: str) -> None:
    if not isinstance(message, dict):
        raise ValueError(
            f'{where} must be an object, got {_short(message)}; write {{"role": …, "content": …}}'
        )
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"{where}.role must be one of {', '.join(ROLES)}, got {role!r}; rename it")
    if isinstance(content, str):
        if PLACEHOLDER in content:
            raise ValueError(
                f"{where}.content must not hold {PLACEHOLDER} without an image, got "
                f'{_short(content)}; list its file in "images", or, if the literal text is meant, '
                'write a {"type": "text"} part'
            )
    elif isinstance(content, list):
        for position, part in enumerate(content):
            _check_part(part, num_media, f"{where}.content[{position}]")
    else:
        raise ValueError(
            f"{where}.content must be text or a list of parts, got {_short(content)}; "
            "leave out turns without content"
        )
    if role == "assistant" and not _has_content(message):
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
    elif kind == "image":
        index = part.get("index")
        if type(index) is not int or not 0 <= index < num_media:
            raise ValueError(
                f"{where}.index must number one of the sample's {num_media} images from 0, "
                f"got {_short(index)}; add the image or fix the index"
            )
    elif kind in LATER_PARTS:
        raise ValueError(
            f"{where}.type must be text or image, got {kind!r}: video and audio are not supported "
            "yet; leave the record out"
        )
    else:
        raise ValueError(
            f"{where}.type must be text or image, got {_short(part if kind is None else kind)}; "
            "write text as a string or a text part"
        )


def _texts(message: dict[str, Any]) -> list[str]:
    content = message["content"]
    if isinstance(content, str):
        return [content]
    return [part["text"] for part in content if part["type"] == "text"]


def _has_content(message: dict[str, Any]) -> bool:
    content = message["content"]
    images = isinstance(content, list) and any(part["type"] == "image" for part in content)
    return images or any(text.strip() for text in _texts(message))


def _short(value: Any) -> str:
    """`value` for an error message: its repr, cut so that a line stays readable."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
