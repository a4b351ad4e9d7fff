"""Runs the fault matrix and writes RELIABILITY.md: what was done to runs, and what became of them.

    make faults                                    all of it, and the mutations
    python tools/faults.py --only kill --only nan  rows by their keys, to the terminal alone

Every row is real: processes are killed, files damaged, disks filled. With --mutations one guard
after the other is switched off, and its row must turn red: a row that stays green tests nothing.
"""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.faults.matrix import GUARDS, ROWS, Guard  # noqa: E402
from tests.faults.outcome import Outcome, Row, in_parallel  # noqa: E402
from tests.faults.stage_jobs import naming  # noqa: E402

Results = list[tuple[Row, Outcome]]
Mutations = list[tuple[Guard, Outcome]]


@click.command(help=__doc__)
@click.option("--only", multiple=True, metavar="KEY", help="Rows; by default all.")
@click.option("--short", is_flag=True, help="A few trials of each row.")
@click.option("--mutations/--no-mutations", default=False, help="Switch off guards, too.")
@click.option("--jobs", default=2, show_default=True, help="Rows at a time.")
@click.option("--output", type=click.Path(path_type=Path), help="The page; by default none.")
def main(only: Sequence[str], short: bool, mutations: bool, jobs: int, output: Path | None) -> None:
    unknown = set(only) - {row.key for row in ROWS}
    if unknown:
        keys = ", ".join(row.key for row in ROWS)
        raise click.UsageError(f"--only: must be one of {keys}, got {sorted(unknown)[0]}")
    rows = [row for row in ROWS if not only or row.key in only]
    guards = [guard for guard in GUARDS if mutations and (not only or guard.row in only)]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    began = time.monotonic()
    scratch = Path(tempfile.mkdtemp(prefix="faults-"))
    found: dict[str, Outcome] = {}
    try:
        run(rows, guards, scratch, found, short=short, jobs=jobs)
    except KeyboardInterrupt:
        click.echo("\ninterrupted: the page has the rows that had ended", err=True)
    finally:
        end_all(str(scratch))
        shutil.rmtree(scratch, ignore_errors=True)
    results = [(row, found[row.key]) for row in rows if row.key in found]
    mutated = [(guard, found[guard.name]) for guard in guards if guard.name in found]
    text = page(results, mutated, time.monotonic() - began)
    if output is not None:
        output.write_text(text)
    click.echo(text)
    stay_green = [guard for guard, outcome in mutated if outcome.is_green]
    is_whole = len(found) == len(rows) + len(guards)
    all_green = all(outcome.is_green for _, outcome in results)
    sys.exit(int(bool(stay_green) or not all_green or not is_whole))


def run(
    rows: Sequence[Row],
    guards: Sequence[Guard],
    scratch: Path,
    found: dict[str, Outcome],
    *,
    short: bool,
    jobs: int,
) -> None:
    """Run rows, and short ones without their guards; each in a process and folder of its own.

    What came of them is put into `found` as they end.
    """
    by_key = {row.key: row for row in ROWS}
    works = {row.key: partial(_run_row, row, scratch / row.key, short) for row in rows}
    for number, guard in enumerate(guards):
        folder = scratch / f"without-{number}"
        works[guard.name] = partial(_run_without, guard, by_key[guard.row], folder)
    with click.progressbar(length=len(works), label="faults", file=sys.stderr) as bar:
        for name, outcome in in_parallel(works, jobs):
            found[name] = outcome
            bar.update(1)
            if not outcome.is_green and name in by_key:
                problems = "\n  ".join(outcome.problems[:5])
                click.echo(f"\n{name}: {len(outcome.problems)} problems\n  {problems}", err=True)


def end_all(word: str) -> None:
    """Kill what is left of trials that were cut short: all that names their folder."""
    for pid in naming(word):
        if pid != os.getpid():
            os.kill(pid, signal.SIGKILL)


def _run_row(row: Row, folder: Path, short: bool) -> Outcome:
    folder.mkdir()
    return row.run(folder, short)


def _run_without(guard: Guard, row: Row, folder: Path) -> Outcome:
    guard.disable()
    return _run_row(row, folder, short=True)


def page(results: Results, mutated: Mutations, seconds: float) -> str:
    """RELIABILITY.md."""
    lines = [
        "# What runs survive",
        "",
        f"Written by `{_command()}` in {seconds / 60:.1f} minutes, on {os.cpu_count()} shared "
        f"cores ({platform.machine()}), {_versions()}, commit {_commit()}, "
        f"{time.strftime('%Y-%m-%d')}. Of every trial: *detected*, named as what it is; "
        "*recovered*, what went on from there ended with the same bytes as a run that nothing "
        "happened to; *wrong*, other weights were saved or loaded. How each row is made: "
        "`tests/faults/`.",
        "",
        "| key | fault | trials | detected | recovered | wrong weights | samples lost, repeated "
        "| slowest to be named, allowed | seconds | |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(_line(row, outcome) for row, outcome in results),
    ]
    if mutated:
        lines += [
            "",
            "## Without a guard",
            "",
            "Each is switched off alone, and a short form of its row run: it must turn red.",
            "",
            "| guard that was switched off | row | problems of trials | |",
            "|---|---|---|---|",
            *(_mutation(guard, outcome) for guard, outcome in mutated),
        ]
    return "\n".join(lines) + "\n"


def _line(row: Row, outcome: Outcome) -> str:
    named = "–"
    if outcome.seconds:
        worst = max(range(len(outcome.seconds)), key=lambda i: outcome.seconds[i])
        named = f"{outcome.seconds[worst]:.1f} s, {outcome.bounds[worst]:.1f} s"
    cells = [
        *(f"`{row.key}`", row.title, f"{outcome.trials:,}", f"{outcome.detected:,}"),
        *(f"{outcome.recovered:,}", str(outcome.wrong), f"{outcome.lost}, {outcome.repeated}"),
        *(named, f"{outcome.took:.0f}", "green" if outcome.is_green else "**red**"),
    ]
    return f"| {' | '.join(cells)} |"


def _mutation(guard: Guard, outcome: Outcome) -> str:
    colour = "**still green**" if outcome.is_green else "red"
    problems = f"{len(outcome.problems)} of {outcome.trials}" if outcome.trials else "it broke down"
    return f"| {guard.name} | `{guard.row}` | {problems} | {colour} |"


def _command() -> str:
    return f"python tools/faults.py {' '.join(sys.argv[1:])}".strip()


def _versions() -> str:
    return ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "safetensors"))


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
