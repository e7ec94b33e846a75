"""The page: runs from their logs, and the routing of checkpoints."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib import resources
from typing import TYPE_CHECKING

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from evomoe_plugin import __version__
from evomoe_plugin.metrics.log import TrainingLog
from evomoe_plugin.metrics.steps import seconds_per_update, training_flops, training_seconds
from evomoe_plugin.report import charts, findings
from evomoe_plugin.report.charts import Line
from evomoe_plugin.report.expert_maps import expert_maps
from evomoe_plugin.report.heat_map import known, percent, shade

if TYPE_CHECKING:
    from evomoe_plugin.report.routed_sample import RoutedSample

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """A chart over updates.

    Attributes:
        points: of a run, and of one of its stacks of layers where `by_stack`.
        by_cost: also over FLOPs and seconds.
    """

    title: str
    points: Callable[[TrainingLog, str], Points]
    log: bool = False
    by_stack: bool = True
    by_cost: bool = False


def _metric(name: str) -> Callable[[TrainingLog, str], Points]:
    return lambda log, stack: list(zip(*log.series(stack + name), strict=True))


def _valid(name: str) -> Callable[[TrainingLog, str], Points]:
    """The first validation set's."""

    def points(log: TrainingLog, stack: str) -> Points:
        return (
            list(zip(*log.series(stack + name, log.subsets[0]), strict=True)) if log.subsets else []
        )

    return points


def _perplexity(log: TrainingLog, stack: str) -> Points:
    """Without auxiliary losses and smoothing, where they are logged apart."""
    return _metric("ppl")(log, "") or [(x, 2**y) for x, y in _loss(log)]


def _loss(log: TrainingLog) -> Points:
    return _metric("inner_loss")(log, "") or _metric("loss")(log, "")


PANELS = (
    Panel("training perplexity", _perplexity, log=True, by_stack=False, by_cost=True),
    Panel("validation perplexity", _valid("ppl"), log=True, by_stack=False, by_cost=True),
    Panel("experts per token", _metric("experts_per_token")),
    Panel("gate temperature", _metric("temperature")),
    Panel("experts in use per layer", _metric("active_experts")),
    Panel("largest load / mean load", _metric("load_max")),
    Panel("dead experts (share)", _metric("dead_experts")),
    Panel("entropy of the gate (nats)", _metric("gate_entropy")),
    Panel("dropped pairs (share)", _metric("overflow")),
    Panel("null experts per token", _metric("null_rate")),
    Panel("stability of routing", _valid("stability")),
    Panel("purity of routing", _valid("purity")),
    Panel(
        "seconds per update",
        lambda log, _: list(zip(*seconds_per_update(log), strict=True)),
        by_stack=False,
    ),
    Panel("TFLOPS per device", _metric("tflops"), by_stack=False),
    Panel("forward MFLOPs per token", _metric("mflops_per_token")),
)
_PARTS = {
    "forward": "forward_ms",
    "backward": "backward_ms",
    "optimizer": "optimizer_ms",
    "data": "data_wait_ms",
}
_EXCHANGE = "ep_wait_ms"  # in forward and backward passes
_ROWS = 12  # of the table of a chart's values


def render(logs: Sequence[TrainingLog], samples: Sequence[RoutedSample], title: str) -> str:
    """The page as HTML, without links to other files.

    Args:
        logs: of runs, each with a name of its own.
        samples: the routing of checkpoints.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {"number": known, "percent": percent, "shade": shade}
    text = resources.files("evomoe_plugin.report").joinpath("page.html.j2").read_text("utf-8")
    return environment.from_string(text).render(
        title=title,
        version=__version__,
        now=datetime.now().strftime("%Y-%m-%d %H:%M"),
        runs=[(log.name, findings.of_run(log), _style(i)) for i, log in enumerate(logs)],
        panels=_panels(logs),
        parts=list(_PARTS),
        colours=charts.COLOURS,
        speeds=[speed for log in logs if (speed := _speed(log))],
        expert_maps=[(log.name, maps) for log in logs if (maps := expert_maps(log))],
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
    stacks = list(dict.fromkeys(stack for log in logs for stack in log.stacks))
    for panel in PANELS:
        for stack in stacks if panel.by_stack else [""]:
            of_stack = f", {stack.rstrip('_')}" if stack else ""
            lines = [Line(log.name, panel.points(log, stack), i) for i, log in enumerate(logs)]
            found.append((panel.title + of_stack, "update", lines, panel.log))
        if not panel.by_cost:
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


@dataclass(frozen=True)
class Speed:
    """Medians over the last half of a run's updates; None: not logged."""

    name: str
    parts: list[float | None]
    """Milliseconds of an update, in the order of `_PARTS`."""
    exchange: float | None
    seconds: float | None
    tokens_per_second: float | None
    tflops: float | None
    mfu: float | None
    peak_gb: float | None
    hours_left: float | None
    """At the last update."""

    @property
    def bars(self) -> list[tuple[float, float]]:
        """Start and width of each part, in percent of their sum."""
        total = sum(part or 0.0 for part in self.parts)
        ends = itertools.accumulate((part or 0.0 for part in self.parts), initial=0.0)
        return [
            (100 * end / total, 100 * (part or 0.0) / total)
            for end, part in zip(ends, self.parts, strict=False)
        ]


def _speed(log: TrainingLog) -> Speed | None:
    """None if the log has no times of parts."""
    half = log.intervals[-1].update / 2

    def median(name: str) -> float | None:
        updates, values = log.series(name)
        late = [value for n, value in zip(updates, values, strict=True) if n > half]
        return statistics.median(late) if late else None

    parts = [median(name) for name in _PARTS.values()]
    if not any(parts):
        return None
    hours_left = log.series("hours_left")[1]
    seconds = [s for n, s in zip(*seconds_per_update(log), strict=True) if n > half]
    return Speed(
        name=log.name,
        parts=parts,
        exchange=median(_EXCHANGE),
        seconds=statistics.median(seconds) if seconds else None,
        tokens_per_second=median("wps"),
        tflops=median("tflops"),
        mfu=median("mfu"),
        peak_gb=median("peak_gb"),
        hours_left=hours_left[-1] if hours_left else None,
    )
