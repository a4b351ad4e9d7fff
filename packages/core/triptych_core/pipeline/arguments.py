"""A recipe's arguments: what the command line gives them, or their defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from triptych_core.pipeline.config import ArgumentConfig


@dataclass(frozen=True)
class Argument:
    """A value; of a path on this machine also the path."""

    value: str | int | float
    path: Path | None = None


def read_arguments(
    known: Mapping[str, ArgumentConfig], given: Mapping[str, str], root: Path
) -> dict[str, Argument]:
    """The value of each. Paths that are given start where the command is typed, defaults at root.

    Raises:
        ValueError: one line for each that is missing, not there, or of another kind.
    """
    found, mistakes = {}, []
    for name, argument in known.items():
        start = Path.cwd() if name in given else root
        value = given.get(name, argument.default)
        try:
            found[name] = _read(name, argument, value, start)
        except ValueError as error:
            mistakes.append(str(error))
    if mistakes:
        raise ValueError("\n".join(mistakes))
    return found


def _read(
    name: str, argument: ArgumentConfig, value: str | int | float | None, start: Path
) -> Argument:
    kind, about = argument.kind, f" ({argument.about})" if argument.about else ""
    if value is None:
        raise ValueError(f"{name}: must be given{about}, got nothing; add {name}=…")
    if kind == "text":
        return Argument(str(value))
    if kind == "number":
        return Argument(_number(name, value))
    text = str(value)
    if kind == "shards" and ("://" in text or set(text) & set("*{[")):
        return Argument(text)  # a pattern or a URL: the stage finds what it names
    path = (start / text).absolute()
    is_there = {"model": (path / "config.json").is_file, "file": path.is_file}
    if not is_there.get(kind, path.exists)():
        what = {"model": "a local Hugging Face directory", "shards": "shards that are there"}
        raise ValueError(
            f"{name}: must be {what.get(kind, f'a {kind} that is there')}{about}, got '{value}'; "
            "check the path"
        )
    return Argument(str(path), path)


def _number(name: str, value: str | int | float) -> int | float:
    for read in (int, float):
        try:
            return read(value) if isinstance(value, str) else value
        except ValueError:
            continue
    raise ValueError(f"{name}: must be a number, got '{value}'")
