"""What the commands of `triptych-data` share: options, units, progress, how errors end."""

import difflib
import errno
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click

from triptych_data.storage.secrets import masked

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
INTERRUPTED = 130
"""Exit code after Ctrl-C, as of shells: 128 + SIGINT."""


class OneLineErrors(click.Group):
    """What a user can cause ends with one line: in the arguments with exit code 2, else with 1."""

    def main(self, *args: Any, **extra: Any) -> Any:
        standalone = extra.pop("standalone_mode", True)
        run: Callable[..., Any] = partial(super().main, *args, **extra, standalone_mode=False)
        if not standalone:
            return run()
        try:
            code = run()
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            code = error.exit_code
        except click.UsageError as error:
            hint = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
            click.echo(f"Error: {one_line(error.format_message())}{hint}", err=True)
            code = error.exit_code
        except click.ClickException as error:
            error.show()
            code = error.exit_code
        except click.Abort:
            click.echo("Interrupted", err=True)
            code = INTERRUPTED
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # `| head` has seen enough
            raise
        except (ValueError, ImportError) as error:  # ImportError: an optional package is missing
            raise click.ClickException(one_line(str(error))) from error
        except OSError as error:
            raise click.ClickException(describe(error)) from error

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and self.get_command(ctx, args[0]) is None:
            near = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
            if near:
                ctx.fail(f"No such command {args[0]!r}. Did you mean {near[0]!r}?")
        return super().resolve_command(ctx, args)


class Size(click.ParamType):
    """Bytes, written as 256MB, 1.5GiB or a plain number."""

    name = "size"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"([\d.]+)\s*([kmg]i?|)b?", value.strip().lower())
        if not match or match[1].count(".") > 1 or match[1] == ".":
            self.fail(f"{value!r} is no size such as 256MB or 1GiB", param, ctx)
        return int(float(match[1]) * UNITS[match[2]])


class CountOrShare(click.ParamType):
    """A number, or a share of all: 1000, 2.5%."""

    name = "count or share"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        match = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?)%", str(value).strip())
        if not match or (match[2] and float(match[2]) > 100):
            self.fail(f"{value!r} is no number such as 1000 and no share such as 2.5%", param, ctx)
        if match[1]:
            return float(match[1])
        return float(match[2]) / 100 if float(match[2]) < 100 else float("inf")


workers = click.option(
    "--workers",
    type=click.IntRange(1),
    default=lambda: min(8, len(os.sched_getaffinity(0))),
    show_default="cores, at most 8",
    help="Processes to use; the output does not depend on it.",
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
min_pixels = click.option("--min-pixels", type=int, help="Replaces the model folder's bound.")
max_pixels = click.option("--max-pixels", type=int, help="Replaces the model folder's bound.")
shard_size = click.option(
    "--shard-size", type=Size(), default="256MB", show_default=True, help="Most bytes of a shard."
)
samples_per_shard = click.option(
    "--samples-per-shard", type=click.IntRange(1), help="Most samples of a shard."
)
shuffle = click.option(
    "--shuffle", is_flag=True, help="Write the samples in a random, repeatable order."
)
overwrite = click.option(
    "--overwrite", is_flag=True, help="Replace the shards in OUTPUT, nothing else there."
)
seed = click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    show_default=True,
    help="Seed of --shuffle.",
)


def one_line(message: str) -> str:
    """A message without line breaks and secrets."""
    return masked(" ".join(message.split()))


def describe(error: OSError) -> str:
    """An error of the system, the file first."""
    if error.strerror is None:
        return one_line(str(error))
    return one_line(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)


def print_json(value: Any) -> None:
    """The one thing on standard output with --json."""
    click.echo(json.dumps(value, ensure_ascii=False, indent=2))


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar per title on standard error, if that is a terminal; yields (title, done, total)."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks = dict[str, Any]()

        def show(title: str, done: int, total: int) -> None:
            if title not in tasks:
                tasks[title] = bars.add_task(title, total=None)
            bars.update(tasks[title], completed=done, total=total)

        yield show


@contextmanager
def resumable(output: Path) -> Iterator[None]:
    """Ctrl-C, or a full disk, says what is kept in `output`, and that the same command goes on."""
    from triptych_data.shards.staging import progress_kept

    try:
        yield
    except KeyboardInterrupt:
        click.echo(f"Interrupted: {progress_kept(output)}", err=True)
        raise click.exceptions.Exit(INTERRUPTED) from None
    except OSError as error:
        message = describe(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            message = f"{output}: {message}; {progress_kept(output)}"
        raise click.ClickException(message) from error
