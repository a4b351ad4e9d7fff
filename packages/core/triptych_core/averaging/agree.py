"""Inputs that do not belong together are refused, with the names that differ."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from triptych_core.averaging.direct import Landing
from triptych_core.averaging.recipe import Recipe
from triptych_core.averaging.stored import AVERAGED, NAMES_OF_DTYPES, Reader, Source

_SHOWN = 10  # differing names that a message lists
_CHUNK = 1 << 22


def check_agreement(sources: list[Source], recipe: Recipe) -> None:
    """All inputs have the same tensors, in shapes, dtypes and what is not averaged.

    Raises:
        ValueError: with the names that differ.
    """
    first = sources[0]
    for other in sources[1:]:
        _check_names(first, other)
        one = "average models of one architecture and vocabulary"
        _check_each(first, other, "shapes", lambda tensor: list(tensor.shape), one)
        _check_each(
            first, other, "dtypes", lambda tensor: _name(tensor.dtype), "save both in one dtype"
        )
    _check_floats(first, recipe)
    _check_equal(sources, recipe)


def _check_each(
    first: Source, other: Source, what: str, read: Callable[[Any], Any], remedy: str
) -> None:
    pairs = ((name, read(other.tensors[name]), read(own)) for name, own in first.tensors.items())
    found = (f"{name} {given} not {wanted}" for name, given, wanted in pairs if given != wanted)
    _refuse(other, f"have the {what}", found, first, remedy)


def _check_names(first: Source, other: Source) -> None:
    _refuse(
        other,
        "have the tensors",
        [
            *(f"no {name}" for name in first.tensors if name not in other.tensors),
            *(f"also {name}" for name in other.tensors if name not in first.tensors),
        ],
        first,
        "average models of one architecture",
    )


def _check_floats(first: Source, recipe: Recipe) -> None:
    """Floats of eight bits mean something only with their scales."""
    small = (
        f"{name} {_name(stored.dtype)}"
        for name, stored in first.tensors.items()
        if stored.dtype.is_floating_point
        and stored.dtype not in AVERAGED
        and not recipe.is_excluded(name)
    )
    names = list(small)
    if names:
        raise ValueError(
            f"{first.path}: must be in 16 bits or more to be averaged, got {_listed(names)}; "
            "dequantise the models first or --exclude these"
        )


def _check_equal(sources: list[Source], recipe: Recipe) -> None:
    """Integers and flags are not averaged: they must be the same in all inputs."""
    first = sources[0]
    names = [
        name
        for name, stored in first.tensors.items()
        if not stored.dtype.is_floating_point and not recipe.is_excluded(name)
    ]
    if not names:
        return
    ours, theirs = (Landing(_CHUNK) for _ in range(2))
    with Reader() as reader:
        reader.open(sources)
        for other in sources[1:]:
            unequal = (
                name for name in names if not _is_equal(reader, first, other, name, ours, theirs)
            )
            _refuse(
                other,
                "hold the same integers",
                unequal,
                first,
                "--exclude them to take those of --copy-from",
            )


def _is_equal(
    reader: Reader,
    first: Source,
    other: Source,
    name: str,
    ours: Landing,
    theirs: Landing,
) -> bool:
    one, two = first.tensors[name], other.tensors[name]
    step = _CHUNK // one.dtype.itemsize
    return all(
        torch.equal(
            reader.read(one, begin, min(begin + step, one.size), ours),
            reader.read(two, begin, min(begin + step, one.size), theirs),
        )
        for begin in range(0, one.size, step)
    )


def _refuse(other: Source, what: str, found: Iterable[str], first: Source, remedy: str) -> None:
    names = list(found)
    if names:
        raise ValueError(
            f"{other.path}: must {what} of {first.path}, got {_listed(names)}; {remedy}"
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _name(dtype: torch.dtype) -> str:
    return NAMES_OF_DTYPES[dtype]
