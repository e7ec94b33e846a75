"""Heat maps as SVG: values on hover, and a table of the same values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from markupsafe import Markup

from evomoe_plugin.report.charts import number

WIDTH = 360
_LEFT, _RIGHT, _BOTTOM = 34, 8, 36
_GAP = 15  # least height of a label
ROWS_OF_TABLE = 12

Value = float | None


@dataclass(frozen=True)
class HeatMap:
    """Values by row and column."""

    title: str
    row: str
    """What a row is, "expert"; rows are numbered from 0."""
    column: str
    columns: Sequence[int]
    """Numbers of the columns."""
    values: Sequence[Sequence[Value]]
    """By column, then by row; None and NaN: there is none. Columns may differ in length."""
    high: float
    """Value of the darkest colour."""
    in_percent: bool = False

    @property
    def svg(self) -> Markup:
        """The picture."""
        rows = max((len(column) for column in self.values), default=0)
        height = min(22.0, max(4.0, 190 / max(rows, 1)))
        width = (WIDTH - _LEFT - _RIGHT) / max(len(self.columns), 1)
        bottom = rows * height
        parts = [
            f'<svg viewBox="0 0 {WIDTH} {bottom + _BOTTOM:.0f}" role="img" '
            f'aria-label="{escape(self.title)}: by {self.row} and {self.column}">'
        ]
        for i, (n, column) in enumerate(zip(self.columns, self.values, strict=True)):
            for row in range(rows):
                value = column[row] if row < len(column) else None
                parts.append(
                    f'<rect x="{_LEFT + i * width:.2f}" y="{row * height:.2f}" '
                    f'width="{width + 0.3:.2f}" height="{height + 0.3:.2f}" '
                    f'fill="{colour(value, self.high)}"><title>'
                    f"{self.column} {n:,}, {self.row} {row}: {self.shown(value)}</title></rect>"
                )
        every = math.ceil(_GAP / height)
        for row in range(0, rows, every):
            y = (row + 0.5) * height + 4.5
            parts.append(f'<text x="{_LEFT - 6}" y="{y:.1f}" class="end">{row}</text>')
        every = math.ceil(56 / width)
        for i in range(len(self.columns) - 1, -1, -every):
            x = _LEFT + (i + 0.5) * width
            anchor = "end" if x > WIDTH - 30 else "mid"
            x = WIDTH - _RIGHT if anchor == "end" else x
            parts.append(
                f'<text x="{x:.1f}" y="{bottom + 15:.1f}" class="{anchor}">'
                f"{self.columns[i]:,}</text>"
            )
        middle, y = (_LEFT + WIDTH - _RIGHT) / 2, bottom + 31
        parts.append(f'<text x="{middle}" y="{y:.1f}" class="mid">{self.column}</text>')
        parts.append(f'<text x="2" y="{y:.1f}">{self.row}</text></svg>')
        return Markup("".join(parts))

    @property
    def table(self) -> tuple[list[str], list[list[Value]]]:
        """Names of at most `ROWS_OF_TABLE` columns, and their values."""
        step = math.ceil(len(self.columns) / ROWS_OF_TABLE) or 1
        kept = range(len(self.columns))[::-1][::step][::-1]
        rows = max((len(column) for column in self.values), default=0)
        return (
            [f"{self.column} {self.columns[i]:,}" for i in kept],
            [[*self.values[i], *[None] * (rows - len(self.values[i]))] for i in kept],
        )

    @property
    def legend(self) -> str:
        """What the colours mean."""
        return f"white: 0, darkest: {self.shown(self.high)}" + " or more" * self.in_percent

    def shown(self, value: Value) -> str:
        """A value as text."""
        return percent(value) + " %" * is_known(value) if self.in_percent else known(value)


def is_known(value: Value) -> bool:
    """Whether there is a number."""
    return value is not None and math.isfinite(value)


def known(value: Value) -> str:
    """A number as text."""
    return number(value) if value is not None else "–"


def percent(share: Value) -> str:
    """A share as a whole number of percent, with one digit below 10."""
    if share is None or not math.isfinite(share):
        return "–"
    if 0 < share < 0.0005:
        return "<0.1"
    return f"{100 * share:.0f}" if share == 0 or share >= 0.0995 else f"{100 * share:.1f}"


def colour(value: Value, high: float) -> str:
    """From white at 0 to dark blue at `high`; grey where there is no value."""
    if value is None or not (math.isfinite(value) and high > 0):
        return "#ddd"
    red, green, blue = (round(255 + _share(value, high) * (end - 255)) for end in (8, 69, 148))
    return f"#{red:02x}{green:02x}{blue:02x}"


def shade(value: Value, high: float) -> str:
    """The style of a table's cell."""
    if not is_known(value):
        return ""
    ink = "#fff" if _share(value, high) > 0.5 else "#111"  # type: ignore[arg-type]
    return f"background:{colour(value, high)};color:{ink}"


def _share(value: float, high: float) -> float:
    return min(max(value / high, 0.0), 1.0) if high > 0 else 0.0
