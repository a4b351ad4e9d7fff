"""A page of a verdict and what it rests on: one HTML file that needs nothing else."""

from __future__ import annotations

import html
from string import Template


def draw_sheet(verdict: str, state: str, body: str) -> str:
    """A page headed by a verdict, which is escaped; state is pass or fail, body is HTML."""
    return _PAGE.substitute(verdict=html.escape(verdict), state=state, body=body)


_PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$verdict</title>
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
  .wide { table-layout: fixed; }
  .wide td { width: 5.5rem; } .wide th { width: auto; color: inherit; }
  .wide .fail { color: var(--fail); }
  dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: 0;
       font-size: .9rem; }
  dt { color: var(--faint); } dd { margin: 0; overflow-wrap: anywhere; }
  iframe { width: 100%; height: 80vh; border: 1px solid var(--line); border-radius: 8px; }
  @media (max-width: 40rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .4rem; } }
</style>
<h1 class="$state">$verdict</h1>
$body
""")
