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
from tests.faults.processes import adopt_orphans, end_descendants  # noqa: E402

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
    adopt_orphans()
    began = time.monotonic()
    scratch = Path(tempfile.mkdtemp(prefix="faults-"))
    found: dict[str, Outcome] = {}
    try:
        run(rows, guards, scratch, found, short=short, jobs=jobs)
    except KeyboardInterrupt:
        click.echo("\ninterrupted: the page has the rows that had ended", err=True)
    finally:
        end_descendants()
        shutil.rmtree(scratch, ignore_errors=True)
    results = [(row, found[row.key]) for row in rows if row.key in found]
    mutated = [(guard, found[guard.name]) for guard in guards if guard.name in found]
    text = page(results, mutated, time.monotonic() - began)
    if output is not None:
        output.write_text(text)
    click.echo(text)
    is_whole = len(found) == len(rows) + len(guards)
    all_green = all(outcome.is_green for _, outcome in results)
    all_red = all(outcome.is_red for _, outcome in mutated)
    sys.exit(int(not (is_whole and all_green and all_red)))


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
            if outcome.broke or (not outcome.is_green and name in by_key):
                wrong = outcome.what_is_wrong
                listed = "\n  ".join(text[-3000:] for text in wrong[:5])
                click.echo(f"\n{name}: {len(wrong)} problems\n  {listed}", err=True)


def _run_row(row: Row, folder: Path, short: bool) -> Outcome:
    folder.mkdir()
    return row.run(folder, short)


def _run_without(guard: Guard, row: Row, folder: Path) -> Outcome:
    guard.disable()
    return _run_row(row, folder, short=True)


def page(results: Results, mutated: Mutations, seconds: float) -> str:
    """RELIABILITY.md."""
    cpu = sum(outcome.cpu for _, outcome in [*results, *mutated])
    lines = [
        "# What runs survive",
        "",
        f"Written by `{_command()}` in {seconds / 60:.0f} minutes, {cpu / 60:.1f} minutes of "
        f"processors, on {os.cpu_count()} cores that others used, too ({_load()}; "
        f"{platform.machine()}), {_versions()}, commit {_commit()}, {time.strftime('%Y-%m-%d')}. "
        "Of every trial: *detected*, named as what it is; *recovered*, what went on from there "
        "ended with the same bytes as a run that nothing happened to, or nothing had to go on; "
        "*wrong*, other weights were saved or loaded; *named after*, the slowest, and what was "
        "allowed it. How each row is made: `tests/faults/`.",
        "",
        "| key | fault | trials | detected | recovered | wrong weights | samples lost, repeated "
        "| named after | seconds | of processors | |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *(_line(row, outcome) for row, outcome in results),
    ]
    for row, outcome in results:
        lines += _why_red(row, outcome)
    if mutated:
        green = {row.key for row, outcome in results if outcome.is_green}
        lines += [
            "",
            "## Without a guard",
            "",
            "Each is switched off alone, and a short form of its row run: trials must fail that "
            "did not before. A row that breaks down, or is late only, does not count.",
            "",
            "| guard that was switched off | row | trials that failed | |",
            "|---|---|---|---|",
            *(_mutation(guard, outcome, guard.row in green) for guard, outcome in mutated),
        ]
    return "\n".join(lines) + "\n"


def _line(row: Row, outcome: Outcome) -> str:
    named = "–"
    if outcome.seconds:
        worst = max(range(len(outcome.seconds)), key=lambda i: outcome.seconds[i])
        named = f"{outcome.seconds[worst]:.1f} s of {outcome.bounds[worst]:.1f} s"
    cells = [
        *(f"`{row.key}`", row.title, f"{outcome.trials:,}", f"{outcome.detected:,}"),
        *(f"{outcome.recovered:,}", str(outcome.wrong), f"{outcome.lost}, {outcome.repeated}"),
        *(named, f"{outcome.took:.0f}", f"{outcome.cpu:.0f}"),
        "green" if outcome.is_green else "**red**",
    ]
    return f"| {' | '.join(cells)} |"


def _why_red(row: Row, outcome: Outcome) -> list[str]:
    if outcome.is_green:
        return []
    wrong = outcome.what_is_wrong or ["no trial was made"]
    first = " ".join(wrong[0].split())
    if len(first) > 700:  # what was found stands before, what the processes said behind
        first = f"{first[:300]} … {first[-400:]}"
    return ["", f"`{row.key}` is red, for {len(wrong)} reasons; the first: {first}"]


def verdict(outcome: Outcome, row_is_green: bool) -> str:
    """What a switched-off guard has shown."""
    if outcome.broke:
        return "**broke down**"
    if not outcome.is_red:
        return "**still green**"
    return "red" if row_is_green else "**says nothing: the row is red anyway**"


def _mutation(guard: Guard, outcome: Outcome, row_is_green: bool) -> str:
    failed = f"{len(outcome.problems)} of {outcome.trials}" if outcome.trials else "–"
    return f"| {guard.name} | `{guard.row}` | {failed} | {verdict(outcome, row_is_green)} |"


def _load() -> str:
    return f"load {os.getloadavg()[2]:.0f} over the last 15 minutes"


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
