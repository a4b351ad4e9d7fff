"""A picture of a resolution search: score on dev against what an answer costs."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

from triptych_core.report.chart import Axis, choose_axis, log_axis, short

WIDTH, HEIGHT = 720, 420
LEFT, RIGHT, TOP, BOTTOM = 70, 510, 40, 360
CLOSE = 10  # pixels within which two labels would lie on each other
# On a light page, and on a dark one.
COLORS = ("#2a6fdb", "#1a936f", "#c2571a", "#7a3fc4", "#6f6f6f", "#b5179e")
DARK_COLORS = ("#7db0ff", "#5fd0a8", "#f0a45c", "#bd97f5", "#a8a8a8", "#f07fd8")


def _variables(ink: str, page: str, edge: str, own: str, chosen: str, rows: Sequence[str]) -> str:
    lines = "".join(f"--c{row}:{color};" for row, color in enumerate(rows))
    return f"--ink:{ink};--page:{page};--edge:{edge};--own:{own};--chosen:{chosen};{lines}"


LIGHT = _variables("#333", "#fff", "#ddd", "#000", "#c00", COLORS)
DARK = _variables("#c9ced6", "#1b1e24", "#343a44", "#fff", "#ff8078", DARK_COLORS)
STYLE = (
    f":root{{{LIGHT}}}@media (prefers-color-scheme:dark){{:root{{{DARK}}}}}"
    "text{font:13px system-ui,sans-serif;fill:var(--ink)}.grid{stroke:var(--edge)}"
    ".small{font-size:11px}.bar{stroke-opacity:.35}.page{fill:var(--page)}"
)


def draw_search(found: dict[str, Any]) -> str:
    """An SVG: a line a min_pixels over its max_pixels, 68 % intervals, the chosen point ringed.

    A label is of the max_pixels of all points at its place.
    """
    points = [_Spot(each) for each in found["dev"]]
    own = next(spot for spot in points if spot.name == "own")
    across = log_axis(min(p.cost for p in points), max(p.cost for p in points) * 1.001)
    up = choose_axis(
        [v for p in points for v in (p.share - p.error, p.share + p.error)], False, None
    )
    axes = _Axes(across, up[0])
    rows = sorted({p.low for p in points if p.name != "own"})
    parts = [_frame(axes)]
    for row, low in enumerate(rows):
        color = f"var(--c{row % len(COLORS)})"
        line = sorted((p for p in points if p.low == low and p.name != "own"), key=lambda p: p.cost)
        path = "".join(f"{'L' if i else 'M'}{axes.spot(p)}" for i, p in enumerate(line))
        parts.append(f'<path d="{path}" style="fill:none;stroke:{color}"/>')
        parts += [_mark(axes, spot, color) for spot in line]
        parts.append(_legend(row, color, f"min {short(low)}"))
    parts += [_mark(axes, own, "var(--own)"), _legend(len(rows), "var(--own)", "the folder's own")]
    chosen = next(spot for spot in points if spot.name == found["chosen"]["point"])
    x, y = axes.x(chosen.cost), axes.y(chosen.share)
    parts.append(
        f'<circle cx="{x}" cy="{y}" r="9" style="fill:none;stroke:var(--chosen)" stroke-width="2"/>'
    )
    parts.append(_legend(len(rows) + 1, "var(--chosen)", "chosen on dev"))
    parts += _labels(axes, points)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="Score on dev against FLOPs"><style>{STYLE}</style>'
        f'<rect class="page" width="{WIDTH}" height="{HEIGHT}"/>{"".join(parts)}</svg>\n'
    )


class _Spot:
    """A point of the picture."""

    def __init__(self, each: dict[str, Any]) -> None:
        self.name, self.low, self.high = each["point"], each["min_pixels"], each["max_pixels"]
        self.count = each["cost"]["questions"]
        self.share = 100 * each["score"]
        self.error = 100 * math.sqrt(each["score"] * (1 - each["score"]) / self.count)
        self.cost = max(each["cost"]["flops"] / self.count, 1.0)


class _Axes:
    """Numbers to places."""

    def __init__(self, across: Axis, up: Axis) -> None:
        self.across, self.up = across, up

    def x(self, cost: float) -> float:
        share = math.log(cost / self.across.low) / math.log(self.across.high / self.across.low)
        return round(LEFT + share * (RIGHT - LEFT), 1)

    def y(self, value: float) -> float:
        share = (value - self.up.low) / (self.up.high - self.up.low)
        return round(BOTTOM - min(max(share, 0), 1) * (BOTTOM - TOP), 1)

    def spot(self, spot: _Spot) -> str:
        return f"{self.x(spot.cost)} {self.y(spot.share)}"


def _frame(axes: _Axes) -> str:
    lines = [
        f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{axes.y(v)}" y2="{axes.y(v)}"/>'
        f'<text x="{LEFT - 8}" y="{axes.y(v) + 4}" text-anchor="end">{text} %</text>'
        for v, text in axes.up.ticks
    ]
    lines += [
        f'<line class="grid" x1="{axes.x(v)}" x2="{axes.x(v)}" y1="{TOP}" y2="{BOTTOM}"/>'
        f'<text x="{axes.x(v)}" y="{BOTTOM + 18}" text-anchor="middle">{text}</text>'
        for v, text in axes.across.ticks
    ]
    middle = (LEFT + RIGHT) / 2
    return "".join(lines) + (
        f'<text x="{LEFT}" y="22">score on the dev split, ± one standard error</text>'
        f'<text x="{middle}" y="{BOTTOM + 42}" text-anchor="middle">FLOPs an answer</text>'
    )


def _mark(axes: _Axes, spot: _Spot, color: str) -> str:
    x, y = axes.x(spot.cost), axes.y(spot.share)
    low, high = axes.y(spot.share - spot.error), axes.y(spot.share + spot.error)
    title = html.escape(f"{spot.low:,} to {spot.high:,} pixels: {spot.share:.1f} %")
    return (
        f'<line class="bar" x1="{x}" x2="{x}" y1="{low}" y2="{high}" style="stroke:{color}"/>'
        f'<circle cx="{x}" cy="{y}" r="4" style="fill:{color}"><title>{title}</title></circle>'
    )


def _labels(axes: _Axes, spots: Sequence[_Spot]) -> list[str]:
    """The max_pixels of every spot; those of spots at one place stand in one text."""
    places: dict[tuple[float, float], set[int]] = {}
    for spot in spots:
        x, y = axes.x(spot.cost), axes.y(spot.share)
        near = (p for p in places if abs(p[0] - x) < CLOSE and abs(p[1] - y) < CLOSE)
        places.setdefault(next(near, (x, y)), set()).add(spot.high)
    return [
        f'<text class="small" x="{x + 12}" y="{y - 8}">'
        f"{', '.join(short(high) for high in sorted(highs))}</text>"
        for (x, y), highs in places.items()
    ]


def _legend(row: int, color: str, text: str) -> str:
    y = TOP + 20 * row + 10
    return (
        f'<circle cx="{RIGHT + 60}" cy="{y - 4}" r="4" style="fill:{color}"/>'
        f'<text x="{RIGHT + 71}" y="{y}">{html.escape(text)}</text>'
    )
