"""Tables of a recipe's report: before and after each stage, an average and its members, kinds."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import yaml

from triptych_core.pipeline.plan import Plan
from triptych_core.report.chart import short
from triptych_core.report.evaluation import TOTAL, scores
from triptych_core.report.page import Run

Scores = dict[str, Any]


def draw_stages(runs: dict[str, Run]) -> Iterator[str]:
    """Held-out loss and score before and after every stage that was evaluated."""
    rows = [
        [name, _heldout(run), *_ends(run, "heldout_loss", short), *_ends(run, "score", _percent)]
        for name, run in runs.items()
        if run.evaluations
    ]
    if not rows:
        return
    heads = ["Stage", "Held out", "Loss before", "after", "Score before", "after"]
    yield "<h2>Held-out samples, before and after each stage</h2>"
    yield (
        '<p class="note">Loss in nats per target token, the mean of each question\'s own metric '
        "as score. Stages with other held-out samples are not to be compared.</p>"
    )
    yield _table(heads, rows, texts=2)


def draw_averages(plan: Plan, scored: dict[str, Scores]) -> Iterator[str]:
    """Every average beside its members, on the same questions."""
    for step in plan.steps.values():
        for name, output in step.outputs.items():
            reference = f"{{{step.name}.{name}}}"
            members = [each for each in step.inputs if each in scored]
            is_average = (output.path / "averaging.json").is_file()
            if is_average and reference in scored and len(members) > 1:
                yield from _compare(step.name, scored[reference], {m: scored[m] for m in members})


def draw_kinds(scored: dict[str, Scores]) -> Iterator[str]:
    """Exact match by kind of question of every model that was scored."""
    if not scored:
        return
    shares = {name: scores(each) for name, each in scored.items()}
    kinds = list(dict.fromkeys(kind for each in shares.values() for kind in each))
    counts = next(iter(scored.values())).get("counts", {})
    rows = []
    for kind in kinds:
        values = [each.get(kind) for each in shares.values()]
        best = max((value for value in values if value is not None), default=None)
        cells = [_bold(_percent(v), v is not None and v == best) for v in values]
        count = counts.get(kind, sum(counts.values()) if kind == TOTAL else None)
        rows.append([kind, f"{count:,}" if count else "–", *cells])
    yield "<h2>By kind of question</h2>"
    yield '<p class="note">Share of answers that match exactly; the best of a row is bold.</p>'
    yield _table(["Kind", "Questions", *(_plain(name) for name in scored)], rows, texts=1)


def paired_difference(ours: Scores, theirs: Scores) -> tuple[float, float] | None:
    """Mean of the differences question by question, and half its 95 % interval.

    None where the two were not asked the same questions.
    """
    asked = [[each["where"] for each in found["answers"]] for found in (ours, theirs)]
    if asked[0] != asked[1] or not asked[0]:
        return None
    pairs = zip(ours["answers"], theirs["answers"], strict=True)
    gains = [a["score"] - b["score"] for a, b in pairs]
    middle = sum(gains) / len(gains)
    variance = sum((gain - middle) ** 2 for gain in gains) / max(1, len(gains) - 1)
    return middle, 1.96 * math.sqrt(variance / len(gains))


def _compare(name: str, average: Scores, members: dict[str, Scores]) -> Iterator[str]:
    rows = []
    for reference, found in members.items():
        told = "–"
        if difference := paired_difference(average, found):
            told = f"{100 * difference[0]:+.1f} ± {100 * difference[1]:.1f}"
        rows.append([_plain(reference), short(found["loss"]), _percent(found["score"]), told])
    mean_loss = sum(found["loss"] for found in members.values()) / len(members)
    mean_score = sum(found["score"] for found in members.values()) / len(members)
    rows.append(["mean of the members", short(mean_loss), _percent(mean_score), ""])
    rows.append([name, short(average["loss"]), _percent(average["score"]), ""])
    yield f"<h2>The average and its members: {html.escape(name)}</h2>"
    yield (
        '<p class="note">On the same held-out questions. The last column is the average\'s score '
        "minus that model's, in points, with what the number of questions leaves open (95 %, "
        "question by question).</p>"
    )
    yield _table(["Model", "Loss", "Score", "Average minus it"], rows, texts=1, ours=len(rows) - 1)


def _heldout(run: Run) -> str:
    """The names of the held-out shards."""
    tree = yaml.safe_load(run.config) or {}
    paths: Sequence[str] = (tree.get("evaluation") or {}).get("shards") or []
    return ", ".join(str(path).rstrip("/").rpartition("/")[2] for path in paths)


def _ends(run: Run, key: str, told: Any) -> list[str]:
    """A number of the first and of the last evaluation; dashes where nothing was asked."""
    found = [run.evaluations[0], run.evaluations[-1]]
    if key == "score" and not found[-1].get("exact_match"):
        return ["–", "–"]
    values = [each.get(key) for each in found]
    before = told(values[0]) if values[0] is not None and len(run.evaluations) > 1 else "–"
    return [before, _bold(told(values[1]), True) if values[1] is not None else "–"]


def _table(
    heads: Sequence[str], rows: Iterable[Sequence[str]], *, texts: int, ours: int | None = None
) -> str:
    """HTML of a table whose first `texts` columns are words, the row `ours` stands out."""
    head = "".join(
        f"<th{'' if column < texts else ' class=' + repr('number')}>{html.escape(text)}</th>"
        for column, text in enumerate(heads)
    )
    lines = []
    for number, (first, *rest) in enumerate(rows):
        cells = "".join(
            f"<td{'' if column < texts else ' class=' + repr('number')}>{text}</td>"
            for column, text in enumerate(rest, start=1)
        )
        mark = ' class="ours"' if number == ours else ""
        lines.append(f"<tr{mark}><th>{html.escape(first)}</th>{cells}</tr>")
    return (
        f'<div class="card scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _plain(reference: str) -> str:
    """`{sft.export}` as the step's name."""
    return reference.strip("{}").partition(".")[0]


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def _bold(text: str, is_best: bool) -> str:
    return f"<b>{text}</b>" if is_best else text
