"""The part of the run report on a mixture of experts: how evenly tokens fell on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from triptych_core.report.chart import short
from triptych_core.report.expert_load import Load, entropy, split_load

_TITLES = {"text": "Tokens of text", "images": "Tokens of images"}
_WIDTH, _HEIGHT = 256, 14  # of a layer's strip, in pixels


def draw_experts(steps: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The HTML of the last `expert_load` (layers, experts) of metrics.jsonl, if there is one.

    Of each sparse layer: the busiest and the least busy expert's tokens as multiples of the mean,
    how many got none, the entropy, and a strip with a cell for each expert, the darker the busier.
    Where the model sees images, a table of tokens of text and one of images follow.
    """
    loads = [(step["step"], split_load(step)) for step in steps if step.get("expert_load")]
    if not loads:
        return
    number, tables = loads[-1]
    yield (
        f'<h2>Load of experts</h2><p class="note">Tokens at step {number:,}; 1 is even, also of '
        "the entropy of shares.</p>"
    )
    for kind, load in tables.items():
        if kind:
            yield f"<h3>{_TITLES[kind]}</h3>"
        yield _table(load)


def _table(load: Load) -> str:
    titles = ("Busiest", "Least busy", "Idle experts", "Entropy")
    head = "".join(f'<th class="number">{title}</th>' for title in titles)
    rows = "".join(_row(layer, counts) for layer, counts in enumerate(load, start=1))
    return (
        f'<div class="card scroll"><table><thead><tr><th>Sparse layer</th>{head}<td></td></tr>'
        f"</thead><tbody>{rows}</tbody></table></div>"
    )


def _row(layer: int, counts: Sequence[float]) -> str:
    mean = max(sum(counts) / len(counts), 1e-9)
    shares = [count / mean for count in counts]
    numbers = (
        *(short(max(shares)), short(min(shares)), str(list(counts).count(0))),
        f"{entropy(counts):.3f}",
    )
    cells = "".join(f'<td class="number">{number}</td>' for number in numbers)
    return f"<tr><th>{layer}</th>{cells}<td>{_strip(shares)}</td></tr>"


def _strip(shares: Sequence[float]) -> str:
    """A cell twice as busy as the mean, or more, is as dark as can be."""
    width = _WIDTH / len(shares)
    cells = "".join(
        f'<rect x="{index * width:.2f}" width="{width:.2f}" height="{_HEIGHT}" '
        f'fill-opacity="{min(share / 2, 1):.2f}"/>'
        for index, share in enumerate(shares)
    )
    return (
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" fill="currentColor" role="img" '
        f'aria-label="load of {len(shares)} experts">{cells}</svg>'
    )
