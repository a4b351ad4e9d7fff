"""JSON from anywhere: what one reader would take for this and another for that is refused."""

import json
import re
from typing import Any

JSON_LIMIT = 64 << 20
"""Bytes of one sample's JSON: no chat has as many, and a line without end would fill the memory."""
DEPTH_LIMIT = 100
"""Levels of nesting; Python's own limit is how much of its stack happens to be left."""
OBJECT_LIMIT = 300_000
"""Opening braces of one sample's JSON, each of which becomes hundreds of bytes of memory."""
SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


def load_json(data: str | bytes, where: str) -> Any:
    """`data` as JSON, UTF-8 with or without a byte order mark.

    Raises ValueError for what is no JSON, and for NaN and infinities, a key that comes twice in one
    object, half a surrogate pair, more than JSON_LIMIT bytes, OBJECT_LIMIT objects or DEPTH_LIMIT
    levels.
    """
    try:
        if len(data) > JSON_LIMIT:
            raise ValueError(f"{len(data)} bytes, of at most {JSON_LIMIT}")
        text = data if isinstance(data, str) else data.decode()
        if (objects := text.count("{")) > OBJECT_LIMIT:
            raise ValueError(f"{objects} opening braces, of at most {OBJECT_LIMIT}")
        value = _DECODER.decode(text.removeprefix("\ufeff"))
        if text.count("{") + text.count("[") > DEPTH_LIMIT:
            _check_depth(value)
        if SURROGATE_ESCAPE.search(text):  # only so can half a surrogate pair get in
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: must be valid JSON in UTF-8, got {error}; fix it") from error
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEPTH_LIMIT):
        children = (node.values() if isinstance(node, dict) else node for node in level)
        level = [c for nodes in children for c in nodes if isinstance(c, dict | list)]
        if not level:
            return
    raise ValueError(f"more than {DEPTH_LIMIT} levels of nesting")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"the constant {name}, which JSON does not have")


def _finite(digits: str) -> float:
    value = float(digits)
    if value - value != 0:
        raise ValueError(f"the number {digits[:40]}, which is beyond what a float holds")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:80]!r} twice in one object")
    return value


# The hooks cost 1 µs a chat; the decoder is made once because making it takes as long again.
_DECODER = json.JSONDecoder(
    parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_unique
)
