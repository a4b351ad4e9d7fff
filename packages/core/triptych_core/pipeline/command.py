"""The `triptych` command: run a recipe, or say where it stands."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from triptych_core.pipeline.check import check_stages
from triptych_core.pipeline.plan import Plan, Step, make_plan
from triptych_core.pipeline.process import Interrupted
from triptych_core.pipeline.run import StepFailed, run_recipe, standing
from triptych_core.pipeline.state import State, last_words
from triptych_core.secrets import mask_tracebacks, masked, masked_words

FOLDER = click.Path(path_type=Path)
NAMES = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(context_settings=NAMES)
def cli() -> None:
    """Train by a recipe: steps that start from what earlier ones made.

    \b
    Example:
      triptych run recipes/mindvl_tiny.yaml --dry-run
      triptych run recipes/mindvl_tiny.yaml
      triptych status recipes/mindvl_tiny.yaml
    """


@cli.command(context_settings=NAMES)
@click.argument("recipe", type=FOLDER)
@click.argument("words", nargs=-1, metavar="[ARGUMENT=VALUE | STEP.KEY=VALUE]...")
@click.option("--only", metavar="STEP", help="Run this step alone; what it reads must be there.")
@click.option(
    "--from",
    "again_from",
    metavar="STEP",
    help="Do this step again, and all that start from it; their folders are set aside.",
)
@click.option("--dry-run", is_flag=True, help="Check everything, show the plan, run nothing.")
@click.option("--dir", "run_dir", type=FOLDER, help="Where all is written; by default runs/RECIPE.")
def run(
    recipe: Path,
    words: tuple[str, ...],
    only: str | None,
    again_from: str | None,
    dry_run: bool,
    run_dir: Path | None,
) -> None:
    """Run RECIPE's steps: what is finished is skipped, what was cut goes on.

    \b
    RECIPE        a YAML file; its scripts are sought from its folder upwards, and run there
    ARGUMENT=     one of the recipe's arguments
    STEP.KEY=     a key of a stage, as in its own command line: align.optim.lr=1e-4
    """
    plan = make_plan(recipe, words, run_dir)
    if dry_run:
        check_stages(plan)
        click.echo(told(plan))
        return
    run_recipe(plan, words, _say, only=only, again_from=again_from)
    click.echo(f"report  {_from_here(plan.dir / 'report.html')}")


@cli.command(context_settings=NAMES)
@click.argument("recipe", type=FOLDER)
@click.argument("words", nargs=-1, metavar="[ARGUMENT=VALUE | STEP.KEY=VALUE]...")
@click.option("--dir", "run_dir", type=FOLDER, help="Where it was run; by default runs/RECIPE.")
def status(recipe: Path, words: tuple[str, ...], run_dir: Path | None) -> None:
    """Where RECIPE stands, a line a step; without words, with those of its last run."""
    folder = run_dir or Path("runs") / recipe.stem
    plan = make_plan(recipe, words or last_words(folder), run_dir)
    click.echo(told(plan))


def told(plan: Plan) -> str:
    """The steps for people: where each stands, what it runs and what it starts from."""
    state = State(plan)
    rows = [_row(plan, step, state) for step in plan.steps.values()]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [f"{plan.name}: {plan.about}".rstrip(": "), f"in {_from_here(plan.dir)}"]
    if plan.root != Path.cwd():
        lines.append(f"steps run in {plan.root}")
    for row in rows:
        head = "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False))
        lines.append(f"{head}  {row[3]}".rstrip())
    for step in plan.steps.values():
        _, changed = standing(plan, step, state)
        lines += [f"{step.name}: {line}; --from {step.name} does it again" for line in changed]
    return "\n".join(lines)


def _row(plan: Plan, step: Step, state: State) -> tuple[str, str, str, str]:
    what, _ = standing(plan, step, state)
    seconds = state.records.get(step.name, {}).get("seconds")
    took = f"{seconds:,.0f} s" if seconds else ""
    start = f"from {', '.join(step.starts_from)}" if step.starts_from else ""
    return step.name, f"{what} {took}".strip(), step.words[0], start


def _from_here(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _say(text: str) -> None:
    """Beside what the steps print, and before it."""
    click.secho(masked(text), fg="cyan", err=True)
    sys.stderr.flush()


def main(argv: list[str] | None = None) -> None:
    """Run the command: 2 is the exit code for mistakes of the user's, 1 for a step that failed."""
    words: list[str] = sys.argv[1:] if argv is None else argv
    mask_tracebacks()
    sys.exit(run_command(words))


def run_command(words: list[str]) -> Any:
    """What `triptych WORDS` does; gives its exit code."""
    again = f"triptych {shlex.join(masked_words(words))}"
    try:
        return cli.main(words, "triptych", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except Interrupted as signal:
        click.echo(f"interrupted; the same command goes on: {again}", err=True)
        return 128 + signal.number
    except (KeyboardInterrupt, click.Abort):
        return 130
    except StepFailed as error:
        click.echo(
            masked(f"error: {error}") + f"\nthe same command goes on from there: {again}", err=True
        )
        return 1
    except (ValueError, OSError) as error:
        for line in str(error).splitlines():
            click.echo(masked(f"error: {line}"), err=True)
        return 2


if __name__ == "__main__":
    main()
