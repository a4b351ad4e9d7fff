"""A Jinja sandbox that also comes to an end: bounded calls, loops and sizes.

Jinja's own keeps a template from Python, but lets it loop for ever and fill the memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import jinja2
import jinja2.nodes
import jinja2.sandbox

MOST_CALLS = 100_000
"""Calls and turns of loops of one rendering: a chat of a thousand messages takes some 20,000."""
MOST_CHARACTERS = 1 << 24
"""Of a text or items of a list that a template makes."""
MOST_BITS = 1 << 12
"""Of a number that a template makes."""
MOST_TEMPLATE = 1 << 22
"""Bytes of a template; those of published models have up to some 20,000."""
_WIDTH = re.compile(r"\d{6,}")
_WIDE_METHODS = ("center", "ljust", "rjust", "zfill", "expandtabs", "format", "format_map")


class BoundedEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Raises SecurityError for a rendering that takes too many calls or makes too large a value."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.calls = 0
        for name in ("center", "indent", "format", "replace", "join"):
            self.filters[name] = self._checked(self.filters[name])

    def begin(self) -> None:
        """Count anew: a rendering starts."""
        self.calls = 0

    def tick(self) -> None:
        """Count a call or a turn of a loop."""
        self.calls += 1
        if self.calls > MOST_CALLS:
            raise _too_much("calls and turns of loops", MOST_CALLS)

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(function, "__func__", None) is BoundedEnvironment.tick:
            return self.tick()
        self.tick()
        for value in (*args, *kwargs.values()):
            _check_width(value)
        name = getattr(function, "__name__", "")
        # The sandbox wraps str.format.
        owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)
        if name in _WIDE_METHODS and isinstance(owner, str) and _WIDTH.search(owner):
            raise _too_much("characters", MOST_CHARACTERS)
        if name == "replace" and isinstance(owner, str):
            _check_replaced(owner, *args)
        return super().call(context, function, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            _check_product(left, right)
            _check_product(right, left)
        elif operator == "**":
            if isinstance(left, int) and isinstance(right, int):
                _check_size(left.bit_length() * abs(right), MOST_BITS, "bits")
        elif operator == "%" and isinstance(left, str) and _WIDTH.search(left):
            raise _too_much("characters", MOST_CHARACTERS)
        elif operator == "+":
            _check_size(_length(left) + _length(right), MOST_CHARACTERS, "characters")
        return super().call_binop(context, operator, left, right)

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """What Jinja joins the pieces of a block with."""
        pieces = list(parts)
        _check_size(sum(map(len, pieces)), MOST_CHARACTERS, "characters")
        return "".join(pieces)

    def joined(self, *values: Any) -> str:
        """What `~` makes of values."""
        return self.concat(map(str, values))

    def _generate(self, source: Any, *args: Any, **kwargs: Any) -> str:
        for loop in source.find_all(jinja2.nodes.For):
            loop.body.insert(0, jinja2.nodes.ExprStmt(_call("tick"), lineno=loop.lineno))
        return super()._generate(_without_tildes(source), *args, **kwargs)

    @staticmethod
    def _checked(function: Any) -> Any:
        """A filter that is given no width, and makes no text, beyond bounds."""

        def checked(*args: Any, **kwargs: Any) -> Any:
            texts = [value for value in args if isinstance(value, str)]
            for value in (*args, *kwargs.values()):
                _check_width(value)
            if function.__name__ == "do_format" and texts and _WIDTH.search(texts[0]):
                raise _too_much("characters", MOST_CHARACTERS)
            if function.__name__ == "do_replace":
                _check_replaced(*texts)
            made = function(*args, **kwargs)
            _check_size(_length(made), MOST_CHARACTERS, "characters")
            return made

        # Jinja looks here for whether a filter wants its context.
        checked.__dict__.update(function.__dict__)
        return checked


def _call(name: str, values: list[jinja2.nodes.Expr] | None = None) -> jinja2.nodes.Call:
    function = jinja2.nodes.EnvironmentAttribute(name)
    return jinja2.nodes.Call(function, values or [], [], None, None)


def _without_tildes(node: Any) -> Any:
    """The tree with `~` as a call of `joined`."""
    for key, value in node.iter_fields():
        if isinstance(value, jinja2.nodes.Node):
            setattr(node, key, _without_tildes(value))
        elif isinstance(value, list):
            nodes = [_without_tildes(v) if isinstance(v, jinja2.nodes.Node) else v for v in value]
            setattr(node, key, nodes)
    if isinstance(node, jinja2.nodes.Concat):
        return _call("joined", node.nodes).set_lineno(node.lineno)
    return node


def _length(value: Any) -> int:
    """Characters; an item of a list takes eight bytes and more."""
    if isinstance(value, list | tuple | dict):
        return 8 * len(value)
    return len(value) if isinstance(value, str) else 0


def _check_product(value: Any, times: Any) -> None:
    if isinstance(times, int):
        _check_size(_length(value) * times, MOST_CHARACTERS, "characters")
        if isinstance(value, int):
            _check_size(value.bit_length() + times.bit_length(), MOST_BITS, "bits")


def _check_replaced(text: str, old: str = "", new: str = "", *_: Any) -> None:
    if isinstance(old, str) and isinstance(new, str) and len(new) > len(old):
        size = len(text) + text.count(old) * (len(new) - len(old))
        _check_size(size, MOST_CHARACTERS, "characters")


def _check_width(value: Any) -> None:
    if isinstance(value, int) and not isinstance(value, bool):
        _check_size(abs(value), MOST_CHARACTERS, "characters")


def _check_size(size: int, most: int, what: str) -> None:
    if size > most:
        raise _too_much(what, most)


def _too_much(what: str, most: int) -> jinja2.exceptions.SecurityError:
    return jinja2.exceptions.SecurityError(f"it makes over {most} {what}")
