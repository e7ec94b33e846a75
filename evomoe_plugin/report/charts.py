"""Line charts as SVG for the page: readable at the width of a phone, values on hover."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 360, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 24, 10, 38
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#B8860B", "#000000")
"""Okabe and Ito's, which colour-blind readers tell apart; runs also differ by their dashes."""
DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 4", "12 4", "1 4")
MOST_POINTS = 200
_MARKED = 20  # points, that are drawn as dots


@dataclass(frozen=True)
class Line:
    """One run's values, in ascending order of x."""

    name: str
    points: Sequence[tuple[float, float]]
    style: int = 0
    """The run's colour and dashes."""


def chart(lines: Sequence[Line], x_label: str, y_label: str, log: bool = False) -> str:
    """An SVG; "" if no line has a finite point.

    Args:
        log: a logarithmic axis of y, whose values are above 0.
    """
    lines = [Line(line.name, _thinned(line.points, log), line.style) for line in lines]
    points = [point for line in lines for point in line.points]
    if not points:
        return ""
    x_ticks = ticks(0, max(x for x, _ in points))
    low, high = min(y for _, y in points), max(y for _, y in points)
    y_ticks = log_ticks(low, high) if log else ticks(min(low, 0) if low < 0.5 * high else low, high)
    across = _scale(x_ticks[0], x_ticks[-1], _LEFT, WIDTH - _RIGHT)
    down = _scale(y_ticks[0], y_ticks[-1], HEIGHT - _BOTTOM, _TOP, log)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(y_label)} by {escape(x_label)}">'
    ]
    for value in y_ticks:
        y = down(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{_LEFT - 5}" y="{y + 4:.1f}" class="end">{number(value)}</text>')
    for value in x_ticks:
        x = across(value)
        parts.append(
            f'<text x="{x}" y="{HEIGHT - _BOTTOM + 15}" class="mid">{number(value)}</text>'
        )
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" class="mid">{escape(x_label)}</text>')
    for line in lines:
        colour = COLOURS[line.style % len(COLOURS)]
        dashes = DASHES[line.style % len(DASHES)]
        path = " ".join(f"{across(x)},{down(y)}" for x, y in line.points)
        parts.append(f'<polyline points="{path}" stroke="{colour}" stroke-dasharray="{dashes}"/>')
        dot = f' stroke="{colour}" class="dot"' if len(line.points) <= _MARKED else ""
        for x, y in line.points:
            title = f"{line.name}: {y_label} {number(y)} at {x_label} {number(x)}"
            parts.append(
                f'<circle cx="{across(x)}" cy="{down(y)}" r="5"{dot}><title>{escape(title)}</title>'
                "</circle>"
            )
    return "".join([*parts, "</svg>"])


def _thinned(points: Sequence[tuple[float, float]], log: bool) -> list[tuple[float, float]]:
    """Finite points, at most `MOST_POINTS`, the last one among them."""
    known = [
        (x, y) for x, y in points if math.isfinite(x) and math.isfinite(y) and (y > 0 or not log)
    ]
    step = math.ceil(len(known) / MOST_POINTS) or 1
    return known[::-1][::step][::-1]


def _scale(low: float, high: float, start: float, end: float, log: bool = False):
    if log:
        low, high = math.log(low), math.log(high)

    def position(value: float) -> float:
        share = ((math.log(value) if log else value) - low) / (high - low)
        return round(start + share * (end - start), 1)

    return position


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from at most `low` to at least `high`."""
    width = (high - low) / (count - 1) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(width))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= width * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers from at most `low` to at least `high`, about evenly in the logarithm."""
    for factors in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 5), (1,)):
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        values = [10.0**power * factor for power in powers for factor in factors]
        first = max(i for i, value in enumerate(values) if value <= low * 1.0001)
        last = min(i for i, value in enumerate(values) if value >= high * 0.9999 and i > first)
        if last - first < 7:
            break
    return values[first : last + 1]


def number(value: float) -> str:
    """Three significant digits, with k, M, G or T from 10,000 on."""
    if not math.isfinite(value):
        return "–"
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= max(size, 1e4):
            return f"{value / size:.3g}{unit}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
