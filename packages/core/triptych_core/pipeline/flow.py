"""The steps of a recipe as cards, those side by side that do not wait for each other."""

from __future__ import annotations

import html

from triptych_core.pipeline.plan import Plan, Step
from triptych_core.pipeline.state import State
from triptych_core.report.page import duration

MARKS = {"done": "✓", "running": "…", "failed": "✗", "stopped": "–"}
STYLE = """<style>
.flow { display: flex; flex-direction: column; gap: 6px; }
.flow .row { display: flex; flex-wrap: wrap; gap: 10px; }
.flow .arrow { text-align: center; color: var(--soft); line-height: 1; }
.step { flex: 1 1 170px; padding: 10px 14px; min-width: 0; }
.step p { margin: 0; font-size: 13px; color: var(--soft); overflow-wrap: anywhere; }
.step h3 { display: flex; justify-content: space-between; gap: 8px; }
.step h3 span { font-weight: 400; color: var(--soft); white-space: nowrap; }
.step a { color: var(--line); }
.step .track { height: 4px; margin-top: 8px; }
tr.ours th, tr.ours td { font-weight: 650; }
</style>"""


def draw_flow(plan: Plan, state: State) -> str:
    """The HTML: a row of cards for each length of the longest way to a step."""
    depths: dict[str, int] = {}
    for step in plan.steps.values():
        depths[step.name] = 1 + max((depths[name] for name in step.starts_from), default=-1)
    longest = max((r.get("seconds", 0.0) for r in state.records.values()), default=0.0)
    rows = []
    for depth in range(max(depths.values()) + 1):
        steps = [plan.steps[name] for name, at in depths.items() if at == depth]
        cards = "".join(_card(step, state.records.get(step.name, {}), longest) for step in steps)
        rows.append(f'<div class="row">{cards}</div>')
    joined = '<div class="arrow">↓</div>'.join(rows)
    return f'{STYLE}<h2>Steps</h2><div class="flow">{joined}</div>'


def _card(step: Step, record: dict[str, object], longest: float) -> str:
    status, seconds = str(record.get("status", "")), float(str(record.get("seconds", 0)))
    name = html.escape(step.name)
    if (step.folder / "report.html").is_file():
        name = f'<a href="{name}/report.html">{name}</a>'
    mark = MARKS.get(status, "")
    kind = {"✓": "right", "✗": "wrong"}.get(mark, "soft")
    took = duration(seconds) if seconds else "to do"
    start = f"from {', '.join(step.starts_from)}" if step.starts_from else ""
    lines = [step.about, step.words[0], start]
    told = "".join(f"<p>{html.escape(line)}</p>" for line in lines if line)
    width = 100 * seconds / longest if longest else 0
    return (
        f'<div class="card step"><h3><b><i class="{kind}">{mark}</i> {name}</b>'
        f"<span>{took}</span></h3>{told}"
        f'<div class="track"><span style="width:{width:.1f}%"></span></div></div>'
    )
