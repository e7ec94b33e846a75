"""The panels of the plot, one metric each. `axes` are matplotlib's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from evomoe_plugin.metrics.log import TrainingLog
from evomoe_plugin.metrics.phases import EXPERTS
from evomoe_plugin.metrics.steps import seconds_per_update


@dataclass(frozen=True)
class Style:
    """Line style of one run."""

    colour: str
    smoothing: float
    """Weight of the moving average."""
    name: str
    """Empty if it is the only run."""


Series = tuple[Sequence[int], Sequence[float]]


@dataclass(frozen=True)
class Panel:
    """One set of axes."""

    label: str
    series: Callable[[TrainingLog], Series]
    """Updates and values of a run; empty if it does not log the metric."""
    lines: Callable[[Any, TrainingLog, Style], None] | None = None
    """Draws a run; None: a line through `series`."""
    finish: Callable[[Any, Sequence[TrainingLog]], Any] = lambda axes, logs: axes.set_ylim(bottom=0)
    """Called after all runs are drawn."""

    def draw(self, axes: Any, log: TrainingLog, style: Style) -> None:
        if self.lines:
            self.lines(axes, log, style)
        else:
            axes.plot(*self.series(log), color=style.colour, linewidth=2)


def smooth(values: Sequence[float], weight: float) -> list[float]:
    """Bias-corrected exponential moving average.

    Args:
        values: NaN/Inf are skipped and kept unchanged.
        weight: of the previous average, in [0, 1).
    """
    averages, total, norm = [], 0.0, 0.0
    for value in values:
        if math.isfinite(value):
            total = weight * total + (1 - weight) * value
            norm = weight * norm + (1 - weight)
            value = total / norm
        averages.append(value)
    return averages


def _loss(log: TrainingLog, subset: str | None = None) -> Series:
    """The language-model loss only, in bits per token."""
    return log.series("inner_loss" if log.series("inner_loss")[0] else "loss", subset)


def _draw_loss(axes: Any, log: TrainingLog, style: Style) -> None:
    updates, loss = _loss(log)
    raw, smoothed = ("", style.name) if style.name else ("training", "training, smoothed")
    axes.plot(updates, loss, color=style.colour, alpha=0.35, linewidth=1, label=raw or None)
    loss = smooth(loss, style.smoothing)
    axes.plot(updates, loss, color=style.colour, linewidth=2, label=smoothed)
    for subset in log.summaries.keys() - {"train"}:
        axes.plot(
            *_loss(log, subset),
            "o",
            markersize=5,
            color=style.colour,
            markerfacecolor="white",
            label=f"{style.name} {subset}".strip(),
        )


def _add_perplexity(axes: Any, logs: Sequence[TrainingLog]) -> None:
    low, high = axes.get_ylim()
    perplexities = [m * 10**e for e in range(12) for m in (1, 2, 5)]
    right = axes.twinx()
    right.set_ylim(low, high)
    shown = [p for p in perplexities if low <= math.log2(p) <= high]
    right.set_yticks([math.log2(p) for p in shown], [f"{p:,}" for p in shown])
    right.set_ylabel("perplexity")
    right.spines[["top", "right"]].set_visible(False)


def _routing_lines(log: TrainingLog) -> list[tuple[str, Series]]:
    """Line style and points of stability and purity in each validation set that has them."""
    lines = [
        (line, log.series(stack + metric, subset))
        for metric, line in (("stability", "-"), ("purity", "--"))
        for stack in log.stacks
        for subset in log.subsets
    ]
    return [(line, series) for line, series in lines if series[0]]


def _routing(log: TrainingLog) -> Series:
    return next((series for _, series in _routing_lines(log)), ((), ()))


def _draw_routing(axes: Any, log: TrainingLog, style: Style) -> None:
    for line, series in _routing_lines(log):
        axes.plot(*series, line, color=style.colour, linewidth=2, marker="o", markersize=4)


def _by_stack(metric: str) -> tuple[Callable[[TrainingLog], Series], Callable[..., None]]:
    """`series` and `lines` of a panel with a line for each stack of layers: solid for the encoder
    or the only stack, dashed for the decoder."""

    def series(log: TrainingLog) -> Series:
        return next((s for stack in log.stacks if (s := log.series(stack + metric))[0]), ((), ()))

    def draw(axes: Any, log: TrainingLog, style: Style) -> None:
        for stack in log.stacks:
            line = "--" if stack == "decoder_" else "-"
            axes.plot(*log.series(stack + metric), line, color=style.colour, linewidth=2)

    return series, draw


def _name_stacks(axes: Any, logs: Sequence[TrainingLog]) -> None:
    if any("decoder_" in log.stacks for log in logs):
        axes.set_ylabel(f"{axes.get_ylabel()}; dashed: decoder")


def _finish_temperature(axes: Any, logs: Sequence[TrainingLog]) -> None:
    axes.set_ylim(bottom=0)
    _name_stacks(axes, logs)


def _finish_experts(axes: Any, logs: Sequence[TrainingLog]) -> None:
    highest = [n for log in logs for stack in log.stacks for n in log.series(stack + EXPERTS)[1]]
    axes.set_ylim(0, 1.08 * max(highest, default=1))
    _name_stacks(axes, logs)
    axes.axhline(1, color="#6b6b6b", linewidth=1, linestyle=":")


PANELS = (
    Panel("loss (bits per token)", _loss, _draw_loss, _add_perplexity),
    Panel("gate temperature", *_by_stack("temperature"), _finish_temperature),
    Panel("experts per token", *_by_stack(EXPERTS), _finish_experts),
    Panel("time per update (seconds)", seconds_per_update),
    Panel(
        "stability (solid), purity (dashed)",
        _routing,
        _draw_routing,
        lambda axes, logs: axes.set_ylim(0, 1.05),
    ),
)
