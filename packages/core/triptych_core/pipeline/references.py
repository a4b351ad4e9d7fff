"""`{step.output}` and `{argument}` in a recipe's values: found, and replaced."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

REFERENCE = re.compile(r"\{([a-z][a-z0-9_]*)(?:\.([a-z0-9_]+))?\}")

Lookup = Callable[[str, str | None], Any]


def find_references(value: Any) -> Iterator[tuple[str, str | None]]:
    """Every name, and output after its dot, in the texts of a tree of lists and dicts."""
    if isinstance(value, str):
        yield from ((name, output or None) for name, output in REFERENCE.findall(value))
    elif isinstance(value, dict):
        for item in value.values():
            yield from find_references(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from find_references(item)


def replace_references(value: Any, lookup: Lookup) -> Any:
    """The tree with what `lookup` gives for each; a text that is one reference becomes the value
    itself, of any type.
    """
    if isinstance(value, dict):
        return {key: replace_references(item, lookup) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [replace_references(item, lookup) for item in value]
    if not isinstance(value, str):
        return value
    whole = REFERENCE.fullmatch(value)
    if whole:
        return lookup(whole[1], whole[2])
    return REFERENCE.sub(lambda found: str(lookup(found[1], found[2])), value)


def written(name: str, output: str | None) -> str:
    """As it stands in the recipe."""
    return f"{{{name}.{output}}}" if output else f"{{{name}}}"
