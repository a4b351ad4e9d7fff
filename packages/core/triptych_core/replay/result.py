"""What a replay found, put together from all ranks: for the console, as JSON, and as a page."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from triptych_core.lines import write_whole
from triptych_core.replay.record import Recorded
from triptych_core.sheet import draw_sheet

SHOWN = 10  # samples and modules on the console


class Document(NamedTuple):
    """A document of a pack: its sample and where that lies, its tokens, targets and summed loss."""

    key: str
    where: str
    tokens: int
    targets: int
    loss_sum: float


class Pack(NamedTuple):
    """What a rank computed of a pack; parts of one have the same position in the data."""

    position: int
    loss_sum: float
    documents: list[Document]
    holes: list[str]


@dataclass(frozen=True)
class Replayed:
    """A step that was run again; losses are means over targets, norms before clipping.

    weights: whose they were. is_exact: whether ranks and weights were those of the run. verdict:
    what the loss guard says of it. forward, backward: by rank, the module whose numbers first
    were none. samples: of all packs, those without a finite loss and then the highest first.
    """

    step: int
    weights: str
    is_exact: bool
    loss: float
    grad_norm: float | None
    verdict: str | None
    recorded: Recorded
    forward: Mapping[int, str]
    backward: Mapping[int, str]
    modules: Mapping[str, float]
    samples: Sequence[Mapping[str, Any]]
    holes: Sequence[str]


def merge_packs(parts: Sequence[Pack], copies: int) -> list[Pack]:
    """Packs in the order of the data, of what ranks computed of them: `copies` hold each part."""
    found: dict[int, list[Pack]] = {}
    for part in parts:
        found.setdefault(part.position, []).append(part)
    return [_merge(found[position], copies) for position in sorted(found)]


def loss_as_in_run(packs: Sequence[Pack], rows: int, targets: int) -> float:
    """The step's loss, its packs added up in fp32 as `rows` ranks would: each its own, then theirs.

    Pack i is of rank i modulo rows.
    """
    divisor = torch.tensor(max(targets, 1))
    ranks = [torch.zeros(()) for _ in range(rows)]
    for number, pack in enumerate(packs):
        ranks[number % rows] += torch.tensor(pack.loss_sum) / divisor
    total = ranks[0]
    for loss in ranks[1:]:
        total = total + loss
    return float(total)


def rank_samples(packs: Sequence[Pack]) -> list[dict[str, Any]]:
    """Every document with its mean loss: no number first, then the highest."""
    samples = [
        {
            "key": document.key,
            "where": document.where,
            "loss": document.loss_sum / document.targets if document.targets else None,
            "targets": document.targets,
            "tokens": document.tokens,
            "position": pack.position,
        }
        for pack in packs
        for document in pack.documents
    ]
    return sorted(samples, key=_badness, reverse=True)


def write_result(result: Replayed, folder: Path) -> Path:
    """Write step-N.json and step-N.html into a folder; returns the page's path."""
    page = folder / f"step-{result.step:06d}.html"
    write_whole(page.with_suffix(".json"), json.dumps(_plain(asdict(result)), indent=2) + "\n")
    write_whole(page, draw_result(result))
    return page


def as_lines(result: Replayed) -> Iterator[str]:
    """For the console."""
    yield from (f"{name}: {value}" for name, value in _facts(result))
    yield from (f"left out: {hole}" for hole in result.holes)
    samples = result.samples[:SHOWN]
    yield f"samples, worst first ({len(samples)} of {len(result.samples)}):"
    yield from (
        f"  {_number(s['loss']):>10}  {s['targets']:>6} targets  {s['where']}" for s in samples
    )
    modules = sorted(result.modules.items(), key=lambda item: _size(item[1]), reverse=True)
    yield f"gradient norms, largest first ({min(SHOWN, len(modules))} of {len(modules)}):"
    yield from (f"  {_number(norm):>10}  {name}" for name, norm in modules[:SHOWN])


def draw_result(result: Replayed) -> str:
    """The page."""
    is_bad = bool(result.forward or result.backward or result.verdict)
    facts = "".join(f"<dt>{_e(name)}</dt><dd>{_e(value)}</dd>" for name, value in _facts(result))
    holes = "".join(f"<p>left out: {_e(hole)}</p>" for hole in result.holes)
    samples = "".join(
        f"<tr{_bad(s['loss'])}><td>{_number(s['loss'])}<td>{s['targets']}<td>{s['tokens']}"
        f"<th>{_e(s['where'])}"
        for s in result.samples
    )
    modules = "".join(
        f"<tr{_bad(norm)}><td>{_number(norm)}<th>{_e(name)}"
        for name, norm in result.modules.items()
    )
    return draw_sheet(
        f"Step {result.step} again: loss {_number(result.loss)}",
        "fail" if is_bad else "pass",
        f"<dl>{facts}</dl>{holes}<h2>Samples, worst first</h2><table class='wide'>"
        f"<tr><td>loss<td>targets<td>tokens<th>sample{samples}</table>"
        f"<h2>Gradient norms</h2><table class='wide'>{modules}</table>",
    )


def _facts(result: Replayed) -> Iterator[tuple[str, str]]:
    recorded = result.recorded
    yield f"step {result.step}", f"loss {_number(result.loss)}{_beside(result.loss, recorded.loss)}"
    norm = _number(result.grad_norm)
    yield "gradient norm", f"{norm}{_beside(result.grad_norm, recorded.grad_norm)}"
    if recorded.why:
        yield "the run left it out", f"its {recorded.why}"
    if result.verdict or result.is_exact:
        yield "now", f"left out: its {result.verdict}" if result.verdict else "would be taken"
    yield "weights", result.weights
    if recorded.keys is not None and sorted({s["key"] for s in result.samples}) != recorded.keys:
        yield "samples", "not those on record: data, processor or ranks are others"
    for what, found in (("forward", result.forward), ("backward", result.backward)):
        named = "; ".join(f"{name} (rank {rank})" for rank, name in found.items())
        yield f"first without a number, {what}", named or "none"


def _beside(value: float | None, recorded: float | None) -> str:
    if recorded is None or value is None:
        return ", none on record"
    if value == recorded or (math.isnan(value) and math.isnan(recorded)):
        return ", to the last bit as on record"
    return f", on record {_number(recorded)}"


def _merge(parts: Sequence[Pack], copies: int) -> Pack:
    documents = [
        same[0]._replace(loss_sum=sum(document.loss_sum for document in same) / copies)
        for same in zip(*(part.documents for part in parts), strict=True)
    ]
    loss = sum(part.loss_sum for part in parts) / copies
    return Pack(parts[0].position, loss, documents, parts[0].holes)


def _badness(sample: Mapping[str, Any]) -> tuple[bool, float]:
    loss = sample["loss"]
    if loss is None:
        return False, -math.inf
    return not math.isfinite(loss), loss if math.isfinite(loss) else 0.0


def _size(norm: float) -> float:
    return norm if math.isfinite(norm) else math.inf


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.6g}"


def _bad(value: float | None) -> str:
    return "" if value is None or math.isfinite(value) else ' class="fail"'


def _plain(value: Any) -> Any:
    """For JSON, which has no word for what is no number: then the word itself."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _e(text: str) -> str:
    return html.escape(text, quote=True)
