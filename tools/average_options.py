"""Types of options that average_checkpoints.py takes."""

from __future__ import annotations

from typing import Any

import click

UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class Bytes(click.ParamType):
    """A number of bytes such as 1G, 512M or 1.5GiB, in powers of 1024."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes of a text."""
        text = str(value).strip().upper().removesuffix("B").removesuffix("I")
        try:
            count = float(text.rstrip("KMGT")) * UNITS.get(text[-1:], 1)
        except ValueError:
            count = 0.0
        if count < 1:
            self.fail(f"must be a size such as 1G or 512M, got '{value}'", param, ctx)
        return int(count)


class Numbers(click.ParamType):
    """Numbers separated by commas."""

    name = "numbers"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        """Numbers of a text."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(part) for part in value.split(","))
        except ValueError:
            self.fail(f"must be numbers separated by commas, got '{value}'", param, ctx)


class ModuleWeights(click.ParamType):
    """A pattern of names and its weights."""

    name = "pattern=numbers"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, tuple[float, ...]]:
        """Pattern and numbers of a text."""
        if isinstance(value, tuple):
            return value
        pattern, _, numbers = value.rpartition("=")
        if not pattern:
            self.fail(f"must be PATTERN=NUMBERS, got '{value}'", param, ctx)
        return pattern, Numbers().convert(numbers, param, ctx)
