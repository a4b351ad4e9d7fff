"""The page of `--verify`: one HTML file that needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from triptych_core.sheet import draw_sheet
from triptych_core.verify.checks import Check

_WORDS = {"pass": "passed", "fail": "failed", "skipped": "skipped"}


def draw_page(checks: Sequence[Check], facts: Mapping[str, str], samples: str) -> str:
    """Verdict, checks with their figures, what was checked, and the page of samples in a frame.

    Whatever the checks and facts hold is escaped; `samples` is a page of its own, or nothing.
    """
    failed = [check for check in checks if check.status == "fail"]
    skipped = sum(check.status == "skipped" for check in checks)
    verdict = f"{len(failed)} of {len(checks)} checks failed" if failed else "All checks passed"
    if skipped and not failed:
        verdict = f"{len(checks) - skipped} checks passed, {skipped} skipped"
    rows = (f"<dt>{_e(name)}</dt><dd>{_e(value)}</dd>" for name, value in facts.items())
    frame = f'<h2>What is trained on</h2><iframe srcdoc="{_e(samples)}"></iframe>'
    articles = "\n".join(_article(check) for check in checks)
    body = f"{articles}<h2>What was checked</h2><dl>{''.join(rows)}</dl>{frame if samples else ''}"
    return draw_sheet(f"Verification: {verdict}", "fail" if failed else "pass", body)


def _article(check: Check) -> str:
    lines = "".join(f"<tr><th>{_e(name)}<td>{_e(value)}" for name, value in check.figures)
    table = f"<details{_open(check)}><summary>figures</summary><table>{lines}</table></details>"
    return (
        f'<article class="{check.status}"><b>{_WORDS[check.status]}</b><h2>{_e(check.name)}</h2>'
        f"<p>{_e(check.found)} <i>{check.seconds:.1f} s</i></p>{table if lines else ''}</article>"
    )


def _open(check: Check) -> str:
    return " open" if check.status == "fail" else ""


def _e(text: str) -> str:
    return html.escape(text, quote=True)
