"""Who holds up a job, from what all ranks say of themselves. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from triptych_core.faults.page import DOES, KINDS

Report = Mapping[str, Any]


class Verdict(NamedTuple):
    """What is said of a standstill, and whether it may go on for a while."""

    ranks: list[int]
    text: str
    is_excused: bool = False


def find_culprit(reports: Sequence[Report], world_size: int) -> Verdict:
    """Name the ranks that others wait for, and what they were doing.

    In this order: ranks that gave no report; that are stopped, or cannot run Python; that do not
    wait for others; of ranks that all wait, those that have entered the fewest collectives, or have
    come least far.
    """
    silent = sorted(set(range(world_size)) - {report["rank"] for report in reports})
    if silent:
        names = ", ".join(map(str, silent))
        return Verdict(silent, f"rank {names} gave no sign: its process, or its machine, is gone")
    for state, what in (("stopped", "is stopped"), ("silent", "cannot run Python: stuck in C")):
        found = [report for report in reports if report["state"] == state]
        if found:
            return _verdict(found, what)
    busy = [report for report in reports if not report["waits"]]
    if busy:
        may = all(report["compiles"] or report["kind"] == "data" for report in busy)
        return _verdict(busy, "holds up the others", is_excused=may)
    counts = [report["collectives"] for report in reports]
    fewest = [report for report in reports if report["collectives"] == min(counts)]
    if len(fewest) < len(reports):
        what = f"has entered {min(counts)} collectives where another has entered {max(counts)}"
        return _verdict(fewest, what)
    least = min(_progress(report) for report in reports)
    behind = [report for report in reports if _progress(report) == least]
    if len(behind) < len(reports):
        return _verdict(behind, "is behind the others")
    return Verdict([], "all ranks wait at the same place: the device or the network")


def describe(report: Report) -> str:
    """One rank in one line."""
    parts = [f"step {report['step']}", DOES[report["kind"]]]
    if report["module"]:
        parts.append(f"last in module {report['module']}")
    if report["at"]:
        parts.append(f"at {report['at']}")
    if report["kind"] == "data":
        parts += filter(None, [report["doing"]])
    elif report["keys"]:
        parts.append(f"samples {report['keys']}")
    return ", ".join(parts)


def _verdict(found: Sequence[Report], what: str, *, is_excused: bool = False) -> Verdict:
    lines = [f"rank {report['rank']} {what}: {describe(report)}" for report in found]
    return Verdict([report["rank"] for report in found], "; ".join(lines), is_excused)


def _progress(report: Report) -> tuple[int, int, int]:
    return report["step"], KINDS.index(report["kind"]), report["beats"]
