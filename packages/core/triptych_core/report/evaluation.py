"""The evaluation part of the run report: scores by type of question, and a gallery of answers."""

from __future__ import annotations

import html
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from triptych_core.report.chart import short

Record = dict[str, Any]

MAX_EXAMPLES = 60  # answers shown, evenly over the types; the file stays small enough to mail
TOTAL = "all questions"
NAMES = {
    "exact_match": "exact match",
    "anls": "ANLS",
    "relaxed_accuracy": "relaxed accuracy",
    "multiple_choice": "multiple choice",
}
NOTHING = "(nothing)"
_TOLD = ("heldout_loss", "exact_match", "scores", "examples")
# Only images inside the file: a report fetches nothing.
_DATA_IMAGE = re.compile(r"data:image/(png|jpeg|webp|gif);base64,[A-Za-z0-9+/=]+")


def draw_evaluation(evaluations: Sequence[Record]) -> Iterator[str]:
    """The HTML of a run's evaluations, ordered by step: the first is "before", the last "after"."""
    if not any(evaluation.get(name) for evaluation in evaluations for name in _TOLD):
        return  # nothing, or drawings alone
    last = evaluations[-1]
    before = evaluations[0] if len(evaluations) > 1 else None
    yield "<h2>Evaluation on held-out samples</h2>"
    losses = [e for e in (before, last) if e and e.get("heldout_loss") is not None]
    if losses:
        told = " and ".join(f"{short(e['heldout_loss'])} at step {e['step']:,}" for e in losses)
        yield f"<p>Held-out loss: {told}.</p>"
    if last.get("exact_match"):
        yield _table(before, last)
    if _has_own_metrics(last):
        yield _metrics_table(before, last)
    if last.get("examples"):
        yield _gallery(before, last)


def scores(evaluation: Record, key: str = "exact_match") -> dict[str, float]:
    """Shares by type of question, and over all questions where the numbers of each are known."""
    shares: dict[str, float] = dict(evaluation.get(key) or {})
    counts = evaluation.get("counts") or {}
    total = sum(counts.get(kind, 0) for kind in shares)
    if len(shares) > 1 and total and all(kind in counts for kind in shares):
        shares[TOTAL] = sum(share * counts[kind] for kind, share in shares.items()) / total
    return shares


def interval(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share seen in `count` draws, after Wilson (1927)."""
    z2 = 1.96**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    reach = math.sqrt(share * (1 - share) / count * z2 + (z2 / (2 * count)) ** 2) / (1 + z2 / count)
    return max(0.0, middle - reach), min(1.0, middle + reach)


def _table(before: Record | None, last: Record) -> str:
    after, majority = scores(last), scores(last, "majority")
    earlier = scores(before) if before else {}
    counts = dict(last.get("counts") or {})
    counts[TOTAL] = sum(counts.values())
    rows = []
    for kind, share in after.items():
        count = counts.get(kind)
        low, high = interval(share, count) if count else (None, None)
        cells = [f"{count:,}" if count else "–", _percent(majority.get(kind))]
        cells += [_percent(earlier.get(kind))] if before else []
        cells += [f"<b>{_percent(share)}</b>", f"{_percent(low)} – {_percent(high)}"]
        numbers = "".join(f'<td class="number">{cell}</td>' for cell in cells)
        rows.append(
            f'<tr class="{"all" if kind == TOTAL else "one"}"><th>{html.escape(kind)}</th>{numbers}'
            f'<td class="bar">{_bar(share, majority.get(kind))}</td></tr>'
        )
    heads = ["Questions", "Majority"]
    heads += [f"Before<br>step {before['step']:,}"] if before else []
    heads += [f"After<br>step {last['step']:,}", "95 % interval"]
    head = "".join(f'<th class="number">{text}</th>' for text in heads)
    return (
        '<p class="note">Share of answers that match the expected one exactly. Majority is what '
        "always giving the commonest answer to that type would score, the mark on the bar. The "
        "interval is what the number of questions leaves open.</p>"
        f'<div class="card scroll"><table><thead><tr><th>Type</th>{head}<td></td></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _has_own_metrics(evaluation: Record) -> bool:
    """Whether there is more to say than exact match over everything."""
    scores_ = evaluation.get("scores") or []
    return len(scores_) > 1 or any(each["metric"] != "exact_match" for each in scores_)


def _metrics_table(before: Record | None, last: Record) -> str:
    """Each metric over the questions that name it, and those of each source."""
    earlier = {(e["metric"], e["source"]): e["score"] for e in (before or {}).get("scores") or []}
    rows = []
    for each in last["scores"]:
        metric, source, share = each["metric"], each["source"], each["score"]
        name = NAMES.get(metric, metric) if source is None else f"– {source}"
        cells = [f"{each['count']:,}"]
        cells += [_percent(earlier.get((metric, source)))] if before else []
        cells += [f"<b>{_percent(share)}</b>"]
        numbers = "".join(f'<td class="number">{cell}</td>' for cell in cells)
        rows.append(
            f'<tr class="{"all" if source is None else "one"}"><th>{html.escape(name)}</th>'
            f'{numbers}<td class="bar">{_bar(share, None)}</td></tr>'
        )
    heads = ["Questions"]
    heads += [f"Before<br>step {before['step']:,}"] if before else []
    heads += [f"After<br>step {last['step']:,}"]
    head = "".join(f'<th class="number">{text}</th>' for text in heads)
    return (
        '<p class="note">The mean of each question\'s own metric, over all questions that name it '
        "and by source: ANLS counts nearness from half right on, relaxed accuracy a number within "
        "5 %, multiple choice the letter or text that an answer means.</p>"
        f'<div class="card scroll"><table><thead><tr><th>Metric</th>{head}<td></td></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share * 100:.1f} %"


def _bar(share: float, majority: float | None) -> str:
    mark = "" if majority is None else f'<u style="left:{majority * 100:.1f}%"></u>'
    return f'<div class="track"><span style="width:{share * 100:.1f}%"></span>{mark}</div>'


def _gallery(before: Record | None, last: Record) -> str:
    """Answers with their images; what the run answered before, where that was kept."""
    examples = last["examples"]
    earlier = {e.get("key"): e.get("answer") for e in (before or {}).get("examples") or []}
    room = max(1, MAX_EXAMPLES // len({example.get("question") for example in examples}))
    seen: Counter[str] = Counter()
    cards = []
    for example in examples:
        seen[example.get("question", "")] += 1
        if seen[example.get("question", "")] <= room:
            cards.append(_example(example, earlier.get(example.get("key"))))
    shown = f", {len(cards)} of {len(examples)} kept" if len(cards) < len(examples) else ""
    return (
        f"<h2>Answers at step {last['step']:,}{shown}</h2>"
        f'<div class="examples">{"".join(cards)}</div>'
    )


def _example(example: Record, earlier: str | None) -> str:
    answer, expected = (str(example.get(key) or "") for key in ("answer", "expected"))
    # Files from before questions had scores of their own hold none.
    score = float(example.get("score", answer.strip() == expected.strip()))
    is_right = score == 1
    verdict = '<b class="right">✓ right</b>' if is_right else '<b class="wrong">✗ wrong</b>'
    if 0 < score < 1:
        metric = str(example.get("metric"))
        verdict = f"<b>{html.escape(NAMES.get(metric, metric))} {score:.2f}</b>"
    images = "".join(
        f'<img src="{source}" alt="image of the question">'
        for source in example.get("images") or []
        if _DATA_IMAGE.fullmatch(source)
    )
    said = f"<b>{html.escape(answer) or NOTHING}</b>"
    said += "" if is_right else f", expected <b>{html.escape(expected)}</b>"
    was = (
        "" if earlier is None else f'<p class="note">before: {html.escape(earlier) or NOTHING}</p>'
    )
    return (
        f'<div class="card example"><div class="note">{html.escape(example.get("question", ""))}'
        f"</div><div>{images}</div><p>{html.escape(example.get('prompt', ''))}</p>"
        f'<p class="verdict">{said} {verdict}</p>{was}</div>'
    )
