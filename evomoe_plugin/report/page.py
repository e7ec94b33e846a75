"""The page: runs from their logs, and the routing of checkpoints."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib import resources
from typing import TYPE_CHECKING

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from evomoe_plugin import __version__
from evomoe_plugin.metrics.log import TrainingLog
from evomoe_plugin.metrics.steps import seconds_per_update
from evomoe_plugin.report import charts, findings
from evomoe_plugin.report.charts import Line, number

if TYPE_CHECKING:
    from evomoe_plugin.report.routed_sample import RoutedSample

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """A chart over updates."""

    title: str
    points: Callable[[TrainingLog], Points]
    log: bool = False


def _metric(name: str) -> Callable[[TrainingLog], Points]:
    return lambda log: list(zip(*log.series(name), strict=True))


def _valid(name: str) -> Callable[[TrainingLog], Points]:
    """The first validation set's."""

    def points(log: TrainingLog) -> Points:
        subsets = sorted(log.summaries.keys() - {"train"}, key=lambda s: (s != "valid", s))
        return list(zip(*log.series(name, subsets[0]), strict=True)) if subsets else []

    return points


PANELS = (
    Panel("training perplexity", lambda log: [(x, 2**y) for x, y in _loss(log)], log=True),
    Panel("validation perplexity", _valid("ppl"), log=True),
    Panel("experts per token", _metric("experts_per_token")),
    Panel("gate temperature", _metric("temperature")),
    Panel("largest load / mean load", _metric("load_max")),
    Panel("dead experts (share)", _metric("dead_experts")),
    Panel("entropy of the gate (nats)", _metric("gate_entropy")),
    Panel("dropped pairs (share)", _metric("overflow")),
    Panel("null experts per token", _metric("null_rate")),
    Panel("stability of routing", _valid("stability")),
    Panel("purity of routing", _valid("purity")),
    Panel("seconds per update", lambda log: list(zip(*seconds_per_update(log), strict=True))),
    Panel("TFLOPS per device", _metric("tflops")),
    Panel("share of the device's peak", _metric("mfu")),
    Panel("forward MFLOPs per token", _metric("mflops_per_token")),
)
_ROWS = 12  # of the table of a chart's values


def _loss(log: TrainingLog) -> Points:
    """In bits, without auxiliary losses where they are logged apart."""
    return _metric("inner_loss" if log.series("inner_loss")[0] else "loss")(log)


def training_flops(log: TrainingLog) -> dict[int, float]:
    """Update -> training FLOPs until then: three forward passes of what was routed."""
    total, before, found = 0.0, 0, {}
    for record in log.intervals:
        values = record.values
        if "mflops_per_token" not in values or "wpb" not in values:
            return {}
        total += 3e6 * values["mflops_per_token"] * values["wpb"] * (record.update - before)
        before = record.update
        found[before] = total
    return found


def training_seconds(log: TrainingLog) -> dict[int, float]:
    """Update -> seconds of training until then."""
    updates, seconds = seconds_per_update(log)
    if len(updates) != len(log.intervals):
        return {}
    lengths = [b - a for a, b in itertools.pairwise([0, *updates])]
    spent = itertools.accumulate(n * s for n, s in zip(lengths, seconds, strict=True))
    return dict(zip(updates, spent, strict=True))


def render(logs: Sequence[TrainingLog], samples: Sequence[RoutedSample], title: str) -> str:
    """The page as HTML, without links to other files.

    Args:
        logs: of runs, each with a name of its own.
        samples: the routing of checkpoints.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {"number": number, "percent": percent, "shade": shade}
    text = resources.files("evomoe_plugin.report").joinpath("page.html.j2").read_text("utf-8")
    return environment.from_string(text).render(
        title=title,
        version=__version__,
        now=datetime.now().strftime("%Y-%m-%d %H:%M"),
        runs=[(log.name, findings.of_run(log), _style(i)) for i, log in enumerate(logs)],
        panels=_panels(logs),
        loads=[(log.name, _loads(log)) for log in logs if log.experts],
        samples=[(sample, findings.of_sample(sample)) for sample in samples],
    )


def _style(run: int) -> Markup:
    """A sample of a run's line."""
    colour = charts.COLOURS[run % len(charts.COLOURS)]
    dashes = charts.DASHES[run % len(charts.DASHES)]
    return Markup(
        '<svg class="key" viewBox="0 0 36 8"><line x1="0" x2="36" y1="4" y2="4" '
        'stroke="{}" stroke-dasharray="{}"/></svg>'
    ).format(colour, dashes)


def _panels(logs: Sequence[TrainingLog]) -> list[tuple[str, Markup, str, list[tuple]]]:
    """Title, chart, name of x, and rows of run, x and y."""
    found = []
    for panel in PANELS:
        lines = [Line(log.name, panel.points(log), i) for i, log in enumerate(logs)]
        found.append((panel.title, "update", lines, panel.log))
        if panel.title != "training perplexity":
            continue
        for x_label, at in (("training FLOPs", training_flops), ("seconds", training_seconds)):
            moved = [
                Line(
                    line.name, [(cost[int(x)], y) for x, y in line.points if x in cost], line.style
                )
                for line, cost in zip(lines, map(at, logs), strict=True)
            ]
            found.append((f"{panel.title} by {x_label}", x_label, moved, panel.log))
    return [
        (title, Markup(drawn), x_label, _rows(lines))
        for title, x_label, lines, log in found
        if (drawn := charts.chart(lines, x_label, title.split(" by ")[0], log))
    ]


def _rows(lines: Sequence[Line]) -> list[tuple]:
    rows = []
    for line in lines:
        step = math.ceil(len(line.points) / _ROWS) or 1
        rows += [(line.name, x, y) for x, y in line.points[::-1][::step][::-1]]
    return rows


def _loads(log: TrainingLog) -> list[tuple[str, list[str], list[list[float]]]]:
    """Of each MoE layer: its name, updates, and the shares of the pairs that the experts had."""
    step = math.ceil(len(log.experts) / _ROWS) or 1
    kept = log.experts[::-1][::step][::-1]
    found = []
    for layer in kept[-1].loads:
        rows = [(record.update, load_E) for record in kept if (load_E := record.loads.get(layer))]
        found.append((layer, [f"update {n:,}" for n, _ in rows], [load_E for _, load_E in rows]))
    return found


def percent(share: float) -> str:
    """A share as a whole number of percent, with one digit below 10."""
    if not math.isfinite(share):
        return "–"
    return f"{100 * share:.0f}" if share == 0 or share >= 0.0995 else f"{100 * share:.1f}"


def shade(value: float, high: float) -> str:
    """The style of a heat map's cell, from white at 0 to dark blue at `high`."""
    if not (math.isfinite(value) and high > 0):
        return ""
    share = min(max(value / high, 0.0), 1.0)
    red, green, blue = (round(255 + share * (end - 255)) for end in (8, 69, 148))
    ink = "#fff" if share > 0.5 else "#111"
    return f"background:rgb({red},{green},{blue});color:{ink}"
