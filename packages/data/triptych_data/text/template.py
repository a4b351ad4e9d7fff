"""Chat templates, rendered as transformers renders them."""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes

from triptych_data.text.bounds import MOST_TEMPLATE, BoundedEnvironment

Message = Mapping[str, Any]

# Private-use characters of the last plane. START + a number's character + text + END surround a
# text that the template quotes; the other two, what it puts between {% generation %} tags.
START, END = "\U0010fffc", "\U0010fffd"
GENERATION, END_GENERATION = "\U0010fffa", "\U0010fffb"

_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of it, the first is today's
# What template code can end in: it is a program from elsewhere, run on data from elsewhere.
_FAILURES = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


class ChatTemplate:
    """A compiled chat template; `where` begins every error, `variables` are what it may read.

    Same sandbox, globals, filters and tags as transformers' `apply_chat_template`, except that
    every rendering ends (`bounds`) and `strftime_now` tells the given `date`: tokens must not
    depend on the day they are made.

    Raises ValueError if the source is no template.
    """

    def __init__(
        self, source: str, where: str, variables: Mapping[str, Any], date: datetime | None = None
    ) -> None:
        self.source = source
        self.where = where
        self._variables = dict(variables)
        try:
            self._plain = _environment(date, mark=False).from_string(source)
            self._marking = _environment(date, mark=True).from_string(source)
            parsed = self._plain.environment.parse(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(
                f"{where}: the chat template must be valid Jinja, got {error} in line "
                f"{error.lineno}; fetch the file again"
            ) from error
        except (RecursionError, SyntaxError, MemoryError) as error:  # of what Jinja compiles it to
            raise ValueError(
                f"{where}: the chat template must nest as people write it, got {error!r}; fetch "
                "the file again"
            ) from error
        self.literals = _literals(parsed)
        self.has_generation = bool(re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", source))

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
        *,
        add_generation_prompt: bool = False,
        mark_generations: bool = False,
    ) -> str:
        """Return the chat as text; `mark_generations` adds the marks around generation blocks.

        Raises ValueError if the template refuses the messages or fails on them.
        """
        template = self._marking if mark_generations else self._plain
        environment = template.environment
        assert isinstance(environment, BoundedEnvironment)
        environment.begin()
        try:
            return template.render(
                messages=[_with_reasoning_names(message) for message in messages],
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        except _FAILURES as error:
            reason = str(error) or type(error).__name__
            raise ValueError(
                f"{self.where}: the chat template refuses the messages: {reason}"
            ) from error


def read_template(directory: Path) -> str:
    """Return the chat template of a model folder as `find_template`. Raises ValueError without."""
    template = find_template(directory)
    if template is None:
        raise ValueError(
            f"{directory}: must hold a chat template, got neither chat_template.jinja nor a "
            "chat_template in tokenizer_config.json; copy it from the model's instruct version"
        )
    return template


def find_template(directory: Path) -> str | None:
    """Return the chat template of a model folder from where transformers looks, newest place first.

    Of several named templates it is the one named default. None if there is none.
    """
    path = directory / "chat_template.jinja"
    if path.exists():
        if path.stat().st_size > MOST_TEMPLATE:
            raise ValueError(
                f"{path}: must have at most {MOST_TEMPLATE} bytes, got {path.stat().st_size}; "
                "fetch the file again"
            )
        return path.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        path = directory / name
        if path.exists():
            template = _default(_load_object(path).get("chat_template"))
            if template is not None:
                return template
    return None


def _load_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: must be valid JSON, got {error}; fetch the file again"
        ) from error
    return value if isinstance(value, dict) else {}


def _default(template: Any) -> str | None:
    if isinstance(template, list):  # [{"name": …, "template": …}, …]
        named = {each.get("name"): each.get("template") for each in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _with_reasoning_names(message: Message) -> Message:
    """Give reasoning under each name templates read it by, as transformers does."""
    given = (message[name] for name in _REASONING if message.get(name) is not None)
    reasoning = next(given, None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _literals(parsed: jinja2.nodes.Template) -> str:
    """All text the template itself holds, apart by NUL so that no token spans two pieces."""
    pieces = {node.data for node in parsed.find_all(jinja2.nodes.TemplateData)}
    constants = (node.value for node in parsed.find_all(jinja2.nodes.Const))
    pieces.update(value for value in constants if isinstance(value, str))
    return "\0".join(sorted(pieces))


class _Generation(jinja2.ext.Extension):
    """The tag {% generation %} … {% endgeneration %}: its body as it is, marked or not."""

    tags = {"generation"}  # noqa: RUF012 - declared by jinja2 as an instance's attribute
    marks = ("", "")

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_print")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _print(self, caller: Any) -> str:
        return f"{self.marks[0]}{caller()}{self.marks[1]}"


class _MarkedGeneration(_Generation):
    marks = (GENERATION, END_GENERATION)


class _Namespace(jinja2.utils.Namespace):
    """A namespace that keeps no underscored name: those reach into Python."""

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _namespace(*args: Any, **kwargs: Any) -> _Namespace:
    values = dict(*args, **kwargs)
    for name in values:
        _check_name(name)
    return _Namespace(values)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(
            f"a namespace must not keep names with a leading underscore, got {name!r}"
        )


def _environment(date: datetime | None, *, mark: bool) -> BoundedEnvironment:
    def strftime_now(layout: str) -> str:
        if date is None:
            raise jinja2.TemplateError(
                "it prints today's date, which would give other tokens on another day; "
                "set data.chat.date to the day it shall print"
            )
        return date.strftime(layout)

    environment = BoundedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_MarkedGeneration if mark else _Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise_exception,
        strftime_now=strftime_now,
        dict=_PlainDict(),
        namespace=_namespace,
    )
    return environment


class _PlainDict:
    """`dict` for templates: callable, with no attribute that leads to the class itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which no model expects."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
