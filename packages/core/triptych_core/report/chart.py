"""Line charts as inline SVG, for the run report: scales, ticks, thinning, and data for hovering."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

WIDTH, HEIGHT = 520, 230  # SVG units; a card is about this many pixels wide
LEFT, RIGHT, TOP, BOTTOM = 58, 500, 12, 190  # the plotting area inside
MAX_POINTS = 2000  # per line; longer runs keep the extremes of each interval
LOG_RATIO = 50.0  # a curve that falls further than this is drawn on a log scale
PEAK_RATIO = 4.0  # a few peaks this far above nearly all values leave the axis alone

Values = Sequence[float | None]


@dataclass(frozen=True)
class Line:
    """One line of a chart: its name, CSS class, steps (n,) and values (n,), None where missing."""

    name: str
    style: str
    steps: Sequence[int]
    values: Values


@dataclass(frozen=True)
class Axis:
    """A vertical axis: its range, its ticks with labels, and whether it is logarithmic."""

    low: float
    high: float
    ticks: list[tuple[float, str]]
    is_log: bool = False

    def y(self, value: float) -> float:
        """SVG height of a value; values beyond the axis stand on its edge."""
        value = min(max(value, self.low), self.high)
        if self.is_log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return round(BOTTOM - share * (BOTTOM - TOP), 1)


def draw_chart(
    lines: Sequence[Line],
    *,
    from_zero: bool,
    top: float | None = None,
    format_value: Callable[[float], str],
) -> tuple[str, dict[str, Any], list[str]]:
    """Draw lines over optimizer steps.

    Args:
        lines: what to draw, the first at the back.
        from_zero: whether the vertical axis starts at zero; a log scale is used only where not.
        top: the largest value there can be, e.g. 100 for a percentage.
        format_value: how a value reads when it is pointed at.

    Returns:
        The SVG, the data for the hover readout (JSON), and notes on scale and cut-off peaks.
    """
    values = [v for line in lines for v in line.values if v is not None]
    axis, notes = choose_axis(values, from_zero, top)
    first, last = min(line.steps[0] for line in lines), max(line.steps[-1] for line in lines)
    start = 0 if first <= 1 else first
    span = max(last - start, 1)

    def x(step: float) -> float:
        return round(LEFT + (step - start) / span * (RIGHT - LEFT), 1)

    parts = [_horizontal_grid(axis), _step_labels(start, start + span, x)]
    hover = []
    for line in lines:
        steps, thinned = thin(line.steps, line.values)
        parts.append(_path(line, steps, thinned, x, axis))
        readings = [None if v is None else format_value(v) for v in thinned]
        hover.append({"name": line.name, "steps": steps, "readings": readings})
    svg = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_label(lines)}">'
        f'{"".join(parts)}<line class="cursor" y1="{TOP}" y2="{BOTTOM}" visibility="hidden"/></svg>'
    )
    data = {"start": start, "span": span, "left": LEFT, "right": RIGHT, "lines": hover}
    return svg, data | {"width": WIDTH}, notes


def choose_axis(values: list[float], from_zero: bool, top: float | None) -> tuple[Axis, list[str]]:
    """Choose range, scale and ticks for finite values (n,); returns the axis and notes on it."""
    low, high = min(values), max(values)
    if not from_zero and low > 0 and high / low > LOG_RATIO:
        return log_axis(low, high), ["log scale"]
    notes = []
    usual = sorted(values)[int(0.98 * (len(values) - 1))]  # at least one value in 50 is above
    if len(values) > 20 and usual > 0 and high > PEAK_RATIO * usual:
        cut = 1.25 * usual
        notes.append(f"{sum(v > cut for v in values)} above the axis, up to {short(high)}")
        high = cut
    if from_zero:
        low = min(low, 0.0)
    if high <= low:  # a constant
        pad = abs(high) * 0.1 or 1.0
        low, high = (0.0 if from_zero and high > 0 else low - pad), high + pad
    step = nice_step((high - low) / 4)
    low, high = math.floor(low / step) * step, math.ceil(high / step - 1e-9) * step
    high = high if top is None else min(high, top)
    marks = [low + i * step for i in range(round((high - low) / step) + 1)]
    return Axis(low, high, [(mark, short(mark, step)) for mark in marks]), notes


def log_axis(low: float, high: float) -> Axis:
    """An axis over decades, with more ticks in each where they are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    decades = math.log10(high / low)
    factors = (1, 2, 5) if decades < 1.9 else (1, 3) if decades < 3.3 else (1,)
    every = max(1, (last - first) // 6)
    marks = [f * 10.0**e for e in range(first, last + 1, every) for f in factors]
    below = [m for m in marks if m <= low] or [low]
    above = [m for m in marks if m >= high] or [high]
    bottom, top = below[-1], above[0]
    return Axis(bottom, top, [(m, short(m)) for m in marks if bottom <= m <= top], is_log=True)


def nice_step(least: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= least * (1 - 1e-9))


def short(value: float, step: float | None = None) -> str:
    """A number for people: 1.5k, 2M, 0.25, 3e-5; `step` sets the digits of a row of ticks."""
    if abs(value) < 1e-12 or (step is not None and abs(value) < step / 1e6):
        return "0"
    unit = step if step is not None else abs(value) / 100
    for scale, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale or (step is not None and step >= scale):
            return _trim(value / scale, unit / scale) + suffix
    if (step is None and abs(value) < 1e-3) or (step is not None and step < 1e-3):
        exponent = math.floor(math.log10(abs(value)) + 1e-9)
        return _trim(value / 10.0**exponent, unit / 10.0**exponent) + f"e{exponent}"
    return _trim(value, unit)


def smooth(values: Values, radius: int) -> list[float | None]:
    """Centred moving mean (n,) over up to 2 * radius + 1 values that are there.

    The window grows from the first value on, so that a steep start is not averaged away.
    """
    sums, counts = [0.0], [0]
    for value in values:
        sums.append(sums[-1] + (value or 0.0))
        counts.append(counts[-1] + (value is not None))
    result: list[float | None] = []
    for i in range(len(values)):
        reach = min(radius, i)
        begin, end = i - reach, min(i + reach + 1, len(values))
        count = counts[end] - counts[begin]
        result.append((sums[end] - sums[begin]) / count if count else None)
    return result


def thin(steps: Sequence[int], values: Values) -> tuple[list[int], list[float | None]]:
    """At most MAX_POINTS points: the least and the greatest value of each of equal intervals."""
    if len(steps) <= MAX_POINTS:
        return list(steps), list(values)
    intervals = MAX_POINTS // 2
    keep: set[int] = set()
    for n in range(intervals):
        part = range(n * len(steps) // intervals, (n + 1) * len(steps) // intervals)
        known = [i for i in part if values[i] is not None] or [part[0]]
        keep.add(min(known, key=lambda i: values[i] or 0.0))
        keep.add(max(known, key=lambda i: values[i] or 0.0))
    order = sorted(keep)
    return [steps[i] for i in order], [values[i] for i in order]


def _trim(value: float, unit: float) -> str:
    """Enough decimals to tell multiples of `unit` apart, no more."""
    decimals = max(0, -math.floor(math.log10(unit) + 1e-9))
    text = f"{value:.{decimals + 1}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _path(
    line: Line, steps: list[int], values: Values, x: Callable[[float], float], axis: Axis
) -> str:
    """A path that breaks where values are missing; dots too where there are few points."""
    commands, dots, pen = [], [], "M"
    for step, value in zip(steps, values, strict=True):
        if value is None:
            pen = "M"
            continue
        commands.append(f"{pen}{x(step)} {axis.y(value)}")
        dots.append(f'<circle cx="{x(step)}" cy="{axis.y(value)}" r="3.5"/>')
        pen = "L"
    marks = "".join(dots) if len(dots) <= 12 else ""
    return f'<g class="{line.style}"><path d="{"".join(commands)}"/>{marks}</g>'


def _horizontal_grid(axis: Axis) -> str:
    return "".join(
        f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{axis.y(v)}" y2="{axis.y(v)}"/>'
        f'<text x="{LEFT - 8}" y="{axis.y(v) + 4:g}" text-anchor="end">{text}</text>'
        for v, text in axis.ticks
    )


def _step_labels(start: int, end: int, x: Callable[[float], float]) -> str:
    step = max(1, int(nice_step(max((end - start) / 5, 1))))
    marks = range(math.ceil(start / step) * step, end + 1, step)
    labels = "".join(
        f'<line class="tick" x1="{x(m)}" x2="{x(m)}" y1="{BOTTOM}" y2="{BOTTOM + 4}"/>'
        f'<text x="{x(m)}" y="{BOTTOM + 18}" text-anchor="middle">{short(m, step)}</text>'
        for m in marks
    )
    middle = (LEFT + RIGHT) / 2
    return f'{labels}<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">optimizer step</text>'


def _label(lines: Sequence[Line]) -> str:
    return html.escape(" and ".join(line.name for line in lines) + " over optimizer steps")
