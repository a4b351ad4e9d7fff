"""One page for a recipe: what each step did, how losses fell, what the models answer."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from triptych_core.lines import write_whole
from triptych_core.pipeline.contents import read_json
from triptych_core.pipeline.flow import draw_flow
from triptych_core.pipeline.plan import Output, Plan, Step
from triptych_core.pipeline.scores import draw_averages, draw_kinds, draw_stages
from triptych_core.pipeline.state import State
from triptych_core.report.chart import short
from triptych_core.report.experts import draw_experts
from triptych_core.report.page import CURVES, Run, draw_curve, duration, fill_page, read_run

LOSS = next(curve for curve in CURVES if curve.key == "loss")


def write_pipeline_report(plan: Plan, state: State) -> Path:
    """Write `report.html` into the recipe's folder, of what its steps have left so far."""
    runs = dict(_read_runs(plan))
    charts, hover = _draw_losses(runs)
    scored = dict(read_scores(plan))
    body = [
        _header(plan, state),
        draw_flow(plan, state),
        charts,
        *draw_stages(runs),
        *draw_averages(plan, scored),
        *draw_kinds(scored),
        *_draw_searches(plan),
        *_draw_loads(runs),
    ]
    path = plan.dir / "report.html"
    write_whole(path, fill_page(f"{plan.name} · Triptych", body, hover))
    return path


def read_scores(plan: Plan) -> Iterator[tuple[str, dict[str, Any]]]:
    """By the reference to the model that was scored, such as `{sft.export}`."""
    for step, output in _outputs(plan, "scores"):
        found = read_json(output.path)
        for name in step.inputs:
            if found and "." in name and _kind(plan, name) == "model":
                yield name, found


def _outputs(plan: Plan, kind: str) -> Iterator[tuple[Step, Output]]:
    for step in plan.steps.values():
        for output in step.outputs.values():
            if output.kind == kind:
                yield step, output


def _kind(plan: Plan, reference: str) -> str | None:
    """Of what a reference such as `{sft.export}` gives; None if it is none."""
    name, _, output = reference.strip("{}").partition(".")
    step = plan.steps.get(name)
    return step.outputs[output].kind if step and output in step.outputs else None


def _read_runs(plan: Plan) -> Iterator[tuple[str, Run]]:
    """The stages that have taken a step."""
    for step in plan.steps.values():
        if step.is_stage:
            try:
                yield step.name, read_run(step.folder)
            except ValueError:  # it has not begun
                continue


def _header(plan: Plan, state: State) -> str:
    records = [state.records.get(name, {}) for name in plan.steps]
    done = sum(record.get("status") == "done" for record in records)
    seconds = sum(record.get("seconds", 0) for record in records)
    busy = sum(record.get("processor_seconds", 0) for record in records)
    cards = [
        (f"{done} of {len(records)}", "steps done"),
        (duration(seconds), "for all steps"),
        (duration(busy), "of processors, over all cores"),
    ]
    shown = "".join(f'<div class="card"><b>{b}</b><span>{t}</span></div>' for b, t in cards)
    about = f'<div class="soft">{html.escape(plan.about)}</div>' if plan.about else ""
    return f'<h1>{html.escape(plan.name)}</h1>{about}<div class="numbers">{shown}</div>'


def _draw_losses(runs: dict[str, Run]) -> tuple[str, list[dict[str, Any]]]:
    """A chart of each stage's loss, and what they tell when pointed at."""
    drawn = [draw_curve(replace(LOSS, title=name), run) for name, run in runs.items()]
    found = [each for each in drawn if each is not None]
    if not found:
        return "", []
    figures = "".join(figure for figure, _ in found)
    return (
        f'<h2>Loss of every stage</h2><div class="charts apart">{figures}</div>',
        [hover for _, hover in found],
    )


def _draw_searches(plan: Plan) -> Iterable[str]:
    """The picture of each resolution search, and what came out."""
    for step, output in _outputs(plan, "search"):
        found, picture = read_json(output.path), output.path.with_suffix(".svg")
        if not found or not picture.is_file():
            continue
        test, chosen = found["test"], found["chosen"]
        image = base64.b64encode(picture.read_bytes()).decode()
        bounds = f"{short(chosen['min_pixels'])} to {short(chosen['max_pixels'])} pixels"
        bounds = f"the folder's own bounds, {bounds}," if chosen["point"] == "own" else bounds
        yield (
            f"<h2>Search of the resolution: {html.escape(step.name)}</h2>"
            f'<div class="card scroll"><img style="width:100%;max-width:720px;min-width:600px" '
            f'alt="score on dev against cost" src="data:image/svg+xml;base64,{image}"></div>'
            f"<p>Chosen on the dev split by {found['chosen_by']}: {bounds} with "
            f"{100 * chosen['score']:.1f} %. On the test split {100 * test['chosen']['score']:.1f} "
            f"%, with the folder's own bounds {100 * test['own']['score']:.1f} %: "
            f"{100 * test['difference']:+.1f} ± {100 * test['margin']:.1f} points.</p>"
        )


def _draw_loads(runs: dict[str, Run]) -> Iterable[str]:
    for name, run in runs.items():
        pieces = list(draw_experts(run.steps))
        if pieces:
            yield pieces[0].replace("<h2>Load of experts", f"<h2>Load of experts: {name}")
            yield from pieces[1:]
