"""The page of `--verify`: one HTML file that needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from string import Template

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
    return _PAGE.substitute(
        verdict=_e(verdict),
        state="fail" if failed else "pass",
        checks="\n".join(_article(check) for check in checks),
        facts="".join(rows),
        samples=frame if samples else "",
    )


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


_PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Verification: $verdict</title>
<style>
  :root {
    color-scheme: light dark;
    --page: light-dark(#f6f7f9, #14161a); --card: light-dark(#fff, #1d2026);
    --text: light-dark(#1c2128, #e4e7ec); --faint: light-dark(#5f6873, #98a1ad);
    --line: light-dark(#dfe3e8, #31363f); --pass: light-dark(#1a7f37, #6fdd8b);
    --fail: light-dark(#b3261e, #ff8a80); --skipped: light-dark(#5f6873, #98a1ad);
  }
  body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 4rem; background: var(--page);
         color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
  h1 { font-size: 1.4rem; margin: 0 0 1rem; text-wrap: balance; }
  h1.pass { color: var(--pass); } h1.fail { color: var(--fail); }
  h2 { font-size: 1rem; margin: 0; text-wrap: balance; }
  body > h2 { margin: 2rem 0 .6rem; font-size: 1.1rem; }
  article { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
            border-left-width: 5px; margin: .7rem 0; padding: .7rem 1rem; }
  article.pass { border-left-color: var(--pass); } article.fail { border-left-color: var(--fail); }
  article b { float: right; margin-left: 1rem; font-size: .85rem; }
  .pass b { color: var(--pass); } .fail b { color: var(--fail); }
  .skipped b { color: var(--skipped); }
  article p { margin: .2rem 0 0; overflow-wrap: anywhere; }
  i, summary { color: var(--faint); font-size: .85rem; font-style: normal; }
  table { border-spacing: 0; margin-top: .3rem; font-size: .85rem; width: 100%; }
  th { text-align: left; font-weight: normal; color: var(--faint); padding: .1rem 1rem .1rem 0;
       vertical-align: top; width: 40%; overflow-wrap: anywhere; }
  td { font-family: ui-monospace, monospace; overflow-wrap: anywhere; }
  dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: 0;
       font-size: .9rem; }
  dt { color: var(--faint); } dd { margin: 0; overflow-wrap: anywhere; }
  iframe { width: 100%; height: 80vh; border: 1px solid var(--line); border-radius: 8px; }
  @media (max-width: 30rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .4rem; } }
</style>
<h1 class="$state">$verdict</h1>
$checks
<h2>What was checked</h2>
<dl>$facts</dl>
$samples
""")
