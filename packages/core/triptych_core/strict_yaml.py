"""YAML as configurations need it: plain values, every key once, nothing that grows when it is read.

PyYAML's safe loader makes no objects, but lets the last of two equal keys count without a word, and
keeps what aliases repeat as one object, which explodes when it is walked or printed.
"""

from __future__ import annotations

from typing import Any

import yaml

MOST_DEPTH = 50  # of nesting
MOST_NODES = 100_000  # with what aliases repeat
MOST_SCALAR = 10_000  # characters of a value
MOST_NUMBER = 40  # of a number, in whatever base


def load_yaml(text: str) -> Any:
    """The value of a document; YAMLError or ValueError for one that is not plain."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node, {})
        return loader.construct_document(node)
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    """Counts how deep it stands: the composer calls itself."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > MOST_DEPTH:
            raise _mistake(f"more than {MOST_DEPTH} values within each other", self.peek_event())
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _check(node: Any, sizes: dict[int, int]) -> int:
    """How many values there are in a node, each as often as it is repeated."""
    if id(node) in sizes:
        if not sizes[id(node)]:
            raise _mistake("a value that holds itself", node)
        return sizes[id(node)]
    sizes[id(node)] = 0  # under way
    size = 1 + sum(_check(child, sizes) for child in _children(node))
    if size > MOST_NODES:
        raise _mistake(f"aliases that make more than {MOST_NODES} values", node)
    sizes[id(node)] = size
    return size


def _children(node: Any) -> list[Any]:
    if isinstance(node, yaml.MappingNode):
        keys: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in keys:
                    raise _mistake(f"the key {key.value!r:.80} twice", key)
                keys.add(key.value)
        return [each for pair in node.value for each in pair]
    if isinstance(node, yaml.SequenceNode):
        return list(node.value)
    kind, most = node.tag.rpartition(":")[2], MOST_SCALAR
    if kind in ("int", "float"):
        most = MOST_NUMBER
    if len(node.value) > most:
        raise _mistake(f"a value of more than {most} characters", node)
    return []


def _mistake(what: str, where: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=what, problem_mark=where.start_mark)
