"""The run report: one HTML file, made from what a run folder holds, that needs nothing else.

python -m triptych_core.report.page RUN_DIR
"""

from __future__ import annotations

import argparse
import html
import json
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from string import Template
from typing import Any

from triptych_core.report.chart import Line, draw_chart, short, smooth
from triptych_core.report.evaluation import TOTAL, draw_evaluation, scores
from triptych_core.report.experts import draw_experts
from triptych_core.report.pictures import draw_pictures

Record = dict[str, Any]

GIB = 2**30


@dataclass(frozen=True)
class Run:
    """What a run folder holds; missing files are empty. Steps and evaluations are in order."""

    name: str
    facts: Record
    steps: list[Record]
    evaluations: list[Record]
    config: str


@dataclass(frozen=True)
class Curve:
    """One chart of a key of `metrics.jsonl`: title, unit, factor to that unit, how to draw it."""

    title: str
    unit: str
    key: str
    factor: float = 1.0
    from_zero: bool = True
    top: float | None = None
    is_noisy: bool = True  # draw a smoothed line over the raw one
    is_for_all: bool = True  # or of some models alone: then nobody misses it


CURVES = [
    Curve("Loss", "nats per target token", "loss", from_zero=False),
    Curve("Gradient norm", "before clipping", "grad_norm", from_zero=False),
    Curve("Balance of experts", "1 is even", "balance_loss", from_zero=False, is_for_all=False),
    Curve("Learning rate", "", "lr", is_noisy=False),
    Curve("Throughput", "tokens/s", "tokens_per_second"),
    Curve("Throughput", "images/s", "images_per_second", is_for_all=False),
    Curve("Model FLOPs utilisation", "% of peak", "mfu", 100, top=100),
    Curve("Packing fill", "% of a row is data", "packing_fill", 100, from_zero=False, top=100),
    Curve("Waiting for data", "ms per step", "data_wait_seconds", 1000, from_zero=False),
    Curve("Peak memory", "GiB", "peak_memory_bytes", 1 / GIB, is_noisy=False),
]


# What every step has and no curve shows; what else is a number is a figure of the model's own.
_TOLD_ELSEWHERE = {
    "step",
    "num_targets",
    "num_tokens",
    "num_images",
    "flops",
    "step_seconds",
    "bad_samples",
    "time",
}


def write_report(run_dir: Path | str) -> Path:
    """Write `report.html` into a run folder and return its path.

    Reads `metrics.jsonl`, `evaluation.jsonl`, `run.json` and `config.yaml`, each if it is there.
    Raises ValueError where a line is not JSON, or where there is nothing to report.
    """
    run = read_run(Path(run_dir))
    charts, hover = draw_charts(run)
    body = [_header(run), _numbers(run), _facts(run), charts]
    body += [*draw_experts(run.steps), *draw_evaluation(run.evaluations)]
    body += [*draw_pictures(run.evaluations), _config(run)]
    page = fill_page(f"{run.name} · Triptych", body, hover)
    path = Path(run_dir) / "report.html"
    path.write_text(page, "utf-8")
    return path


def fill_page(title: str, body: Iterable[str], hover: list[Record]) -> str:
    """A page of these pieces of HTML; `hover` has what each chart in them tells, in their order."""
    template = Template(Path(__file__).with_name("template.html").read_text("utf-8"))
    return template.substitute(
        title=html.escape(title),
        body="\n".join(body),
        charts=json.dumps(hover, separators=(",", ":")).replace("<", "\\u003c"),
    )


def read_run(run_dir: Path) -> Run:
    """Read a run folder. Raises ValueError with file and line where something is not JSON."""
    # A step that stands there twice was taken again after a resume: the later line counts.
    steps = {line["step"]: line for line in _read_lines(run_dir / "metrics.jsonl")}
    evaluations = {line["step"]: line for line in _read_lines(run_dir / "evaluation.jsonl")}
    if not steps and not evaluations:
        raise ValueError(
            f"{run_dir}: must hold a metrics.jsonl or evaluation.jsonl with at least one line, "
            "got none; name a run folder"
        )
    facts, config = run_dir / "run.json", run_dir / "config.yaml"
    return Run(
        name=run_dir.resolve().name,
        facts=_parse(facts.read_text("utf-8"), str(facts)) if facts.exists() else {},
        steps=[steps[step] for step in sorted(steps)],
        evaluations=[evaluations[step] for step in sorted(evaluations)],
        config=config.read_text("utf-8") if config.exists() else "",
    )


def _read_lines(path: Path) -> list[Record]:
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(_parse(line, f"{path}:{number}", "step"))
        except ValueError:
            if number < len(lines):  # the last line may be the one a killed run was writing
                raise
    return records


def _parse(text: str, where: str, *keys: str) -> Record:
    """A JSON object that has `keys`; NaN and infinity become None, as if not measured."""
    try:
        value = json.loads(text, parse_constant=lambda name: None)
    except (json.JSONDecodeError, RecursionError):
        value = None
    if not isinstance(value, dict) or not all(key in value for key in keys):
        wanted = " with " + " and ".join(keys) if keys else ""
        raise ValueError(f"{where}: must be a JSON object{wanted}, got {text[:60]!r}; mend it")
    return value


def draw_charts(run: Run) -> tuple[str, list[Record]]:
    """The HTML of all curves the run has values for, and what each tells when pointed at."""
    figures, hover, missing = [], [], []
    named = run.facts.get("loss")  # of a run whose loss is no cross entropy
    for curve in [*CURVES[:2], *own_curves(run), *CURVES[2:]]:
        if curve.key == "loss" and isinstance(named, str):
            first, *more = named.split("; ")  # all of it stands among the facts
            curve = replace(curve, unit=html.escape(first) + "; …" * bool(more))
        drawn = draw_curve(curve, run)
        if drawn is None:
            missing += [curve.title] * curve.is_for_all
            continue
        missing = [title for title in missing if title != curve.title]
        figures.append(drawn[0])
        hover.append(drawn[1])
    note = f'<p class="note">Not recorded: {", ".join(missing)}.</p>' if missing else ""
    return f'<h2>Curves</h2><div class="charts">{"".join(figures)}</div>{note}', hover


def own_curves(run: Run) -> list[Curve]:
    """Of the figures that this run's model has beside its loss, by their names."""
    shown = _TOLD_ELSEWHERE | {curve.key for curve in CURVES}
    names = {
        key: None
        for record in run.steps
        for key, value in record.items()
        if isinstance(value, float) and key not in shown and not key.startswith("eval/")
    }
    return [
        Curve(html.escape(name.replace("_", " ").capitalize()), "", name, from_zero=False)
        for name in names
    ]


def draw_curve(curve: Curve, run: Run) -> tuple[str, Record] | None:
    """One chart and what it tells when pointed at; None where the run has no value for it."""
    lines = _lines(curve, run)
    return _figure(curve, lines) if lines else None


def _lines(curve: Curve, run: Run) -> list[Line]:
    """What one chart shows: raw and smoothed values, and for the loss also the held-out one."""
    steps = [record["step"] for record in run.steps]
    raw = [record.get(curve.key) for record in run.steps]
    values = [None if value is None else value * curve.factor for value in raw]
    lines = []
    radius = len(values) // 60
    if any(value is not None for value in values):
        lines = [Line(curve.title.lower(), "main", steps, values)]
        if curve.is_noisy and radius:
            smoothed = Line("smoothed", "main", steps, smooth(values, radius))
            lines = [Line("each step", "raw", steps, values), smoothed]
    heldout = [e for e in run.evaluations if e.get("heldout_loss") is not None]
    if curve.key == "loss" and heldout:
        at, losses = [e["step"] for e in heldout], [e["heldout_loss"] for e in heldout]
        lines.append(Line("held out", "other", at, losses))
    return lines


def _figure(curve: Curve, lines: list[Line]) -> tuple[str, Record]:
    svg, hover, notes = draw_chart(
        lines, from_zero=curve.from_zero, top=curve.top, format_value=short
    )
    keys = [f'<span><i class="{line.style}"></i>{line.name}</span>' for line in lines]
    legend = "".join(keys if len(lines) > 1 else []) + "; ".join(notes)
    figure = (
        f'<figure class="card chart"><header><h3>{curve.title}</h3>'
        f'<span class="reading soft" data-rest="{curve.unit}">{curve.unit}</span></header>'
        f'<div class="legend">{legend}</div>{svg}</figure>'
    )
    return figure, hover


def _header(run: Run) -> str:
    device, world_size = run.facts.get("device"), run.facts.get("world_size")
    where = f"{world_size} × {device}" if device and world_size else device
    last = run.steps[-1]["step"] if run.steps else run.evaluations[-1]["step"]
    done = run.facts.get("finished")
    state = f"finished {_moment(done)}" if done else f"not finished, last step {last:,}"
    line = " · ".join(str(part) for part in (where, state) if part)
    return f'<h1>{html.escape(run.name)}</h1><div class="soft">{html.escape(line)}</div>'


def _numbers(run: Run) -> str:
    """The few numbers to see first."""
    cards = [*_quality(run), *_speed(run)]
    shown = "".join(f'<div class="card"><b>{b}</b><span>{text}</span></div>' for b, text in cards)
    return f'<div class="numbers">{shown}</div>'


def _quality(run: Run) -> Iterable[tuple[str, str]]:
    loss = _known(run, "loss")
    if loss:
        count = max(1, len(loss) // 20)
        label = f"loss, mean of the last {count:,} steps" if count > 1 else "loss, last step"
        yield short(statistics.mean(loss[-count:])), label
    last = run.evaluations[-1] if run.evaluations else {}
    if last.get("heldout_loss") is not None:
        yield short(last["heldout_loss"]), "held-out loss"
    if TOTAL in scores(last):
        yield f"{scores(last)[TOTAL]:.1%}", "exact match, all questions"


def _speed(run: Run) -> Iterable[tuple[str, str]]:
    tokens, targets = sum(_known(run, "num_tokens")), sum(_known(run, "num_targets"))
    seconds = sum(_known(run, "step_seconds"))
    if images := sum(_known(run, "num_images")):
        yield short(images), "images"
    if tokens:
        yield short(tokens), f"tokens, {short(targets)} of them targets"
    for unit in ("tokens", "images"):
        if speed := _known(run, f"{unit}_per_second"):
            yield short(statistics.median(speed)), f"{unit}/s, median"
    if mfu := _known(run, "mfu"):
        yield f"{statistics.median(mfu):.1%}", "MFU, median"
    if seconds and (wait := _known(run, "data_wait_seconds")):
        yield f"{sum(wait) / seconds:.1%}", "of the time waiting for data"
    if memory := _known(run, "peak_memory_bytes"):
        yield f"{max(memory) / GIB:.1f} GiB", "peak memory"
    if seconds:
        yield duration(seconds), f"for {len(run.steps):,} steps"


def _known(run: Run, key: str) -> list[float]:
    return [record[key] for record in run.steps if record.get(key) is not None]


def _facts(run: Run) -> str:
    """run.json as a list, in its own order."""
    facts = dict(run.facts)
    for key in ("started", "finished"):
        facts[key] = _moment(facts.get(key))
    facts["resumes"] = "; ".join(map(_resume, facts.get("resumes") or []))
    items = "".join(
        f"<dt>{html.escape(key.replace('_', ' '))}</dt><dd>{html.escape(_plain(value))}</dd>"
        for key, value in facts.items()
        if value not in (None, "", {}, [])
    )
    return f'<dl class="card">{items}</dl>' if items else ""


def _resume(record: Record) -> str:
    """When and from where a run went on, and what was not as it had been."""
    facts = dict(record)
    said = [f"after step {facts.pop('step'):,}", str(_moment(facts.pop("time", None)))]
    was, now = facts.pop("world_size", (None, None))
    said += [f"on {_plain(now)} ranks instead of {_plain(was)}"] * (was != now)
    was, now = facts.pop("code", (None, None))
    said += ["by other code"] * (was != now)
    said += [f"{name.replace('_', ' ')}: {_plain(value)}" for name, value in facts.items() if value]
    return ", ".join(said)


def _plain(value: Any) -> str:
    """A JSON value in one line for people."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    return short(value) if isinstance(value, float) else str(value)


def _moment(value: Any) -> str | None:
    """Seconds since 1970 or an ISO time, as date and time in UTC."""
    if isinstance(value, str):
        value = datetime.fromisoformat(value)
    elif isinstance(value, int | float):
        value = datetime.fromtimestamp(value, UTC)
    if value is None:
        return None
    if value.tzinfo is not None:
        value = value.astimezone(UTC)
    return f"{value:%Y-%m-%d %H:%M} UTC"


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _config(run: Run) -> str:
    if not run.config:
        return ""
    return (
        '<h2>Configuration</h2><details class="card"><summary>config.yaml, resolved</summary>'
        f"<pre>{html.escape(run.config)}</pre></details>"
    )


def main() -> None:
    """The command line: write the report of one run folder, print its path."""
    parser = argparse.ArgumentParser(
        prog="python -m triptych_core.report.page", description=__doc__
    )
    parser.add_argument("run_dir", type=Path)
    try:
        path = write_report(parser.parse_args().run_dir)
    except ValueError as error:
        parser.exit(1, f"{error}\n")
    sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
