"""The panels of the plot, one metric each. `axes` are matplotlib's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from evomoe_plugin.metrics.log import TrainingLog
from evomoe_plugin.metrics.phases import EXPERTS
from evomoe_plugin.metrics.steps import seconds_per_update

TEMPERATURE = "temperature"


@dataclass(frozen=True)
class Style:
    """Line style of one run."""

    colour: str
    smoothing: float
    """Weight of the moving average."""
    name: str
    """Empty if it is the only run."""


@dataclass(frozen=True)
class Panel:
    """One set of axes."""

    applies: Callable[[TrainingLog], bool]
    """Whether a run logs this metric."""
    draw: Callable[[Any, TrainingLog, Style], None]
    finish: Callable[[Any, Sequence[TrainingLog]], None]
    """Called after all runs are drawn."""


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


def loss_name(log: TrainingLog) -> str:
    """The metric of the language-model loss only, in bits per token."""
    return "inner_loss" if log.series("inner_loss")[0] else "loss"


def _draw_loss(axes: Any, log: TrainingLog, style: Style) -> None:
    updates, loss = log.series(loss_name(log))
    axes.plot(updates, loss, color=style.colour, alpha=0.35, linewidth=1,
              label=None if style.name else "training")
    axes.plot(updates, smooth(loss, style.smoothing), color=style.colour, linewidth=2,
              label=style.name or "training, smoothed")
    for subset in log.summaries.keys() - {"train"}:
        axes.plot(*log.series(loss_name(log), subset), "o", markersize=5, color=style.colour,
                  markerfacecolor="white", label=f"{style.name} {subset}".strip())


def _finish_loss(axes: Any, logs: Sequence[TrainingLog]) -> None:
    axes.set_ylabel("loss (bits per token)")
    low, high = axes.get_ylim()
    perplexities = [m * 10**e for e in range(12) for m in (1, 2, 5)]
    right = axes.twinx()
    right.set_ylim(low, high)
    shown = [p for p in perplexities if low <= math.log2(p) <= high]
    right.set_yticks([math.log2(p) for p in shown], [f"{p:,}" for p in shown])
    right.set_ylabel("perplexity")
    for side in ("top", "right"):
        right.spines[side].set_visible(False)


def _draw_temperature(axes: Any, log: TrainingLog, style: Style) -> None:
    axes.plot(*log.series(TEMPERATURE), color=style.colour, linewidth=2)


def _finish_temperature(axes: Any, logs: Sequence[TrainingLog]) -> None:
    axes.set_ylabel("gate temperature")
    axes.set_ylim(bottom=0)


def _draw_experts(axes: Any, log: TrainingLog, style: Style) -> None:
    axes.plot(*log.series(EXPERTS), color=style.colour, linewidth=2)


def _finish_experts(axes: Any, logs: Sequence[TrainingLog]) -> None:
    axes.set_ylabel("experts per token")
    axes.set_ylim(0, 1.08 * max(max(log.series(EXPERTS)[1], default=1) for log in logs))
    axes.axhline(1, color="#6b6b6b", linewidth=1, linestyle=":")


def _draw_time(axes: Any, log: TrainingLog, style: Style) -> None:
    axes.plot(*seconds_per_update(log), color=style.colour, linewidth=2)


def _finish_time(axes: Any, logs: Sequence[TrainingLog]) -> None:
    axes.set_ylabel("time per update (seconds)")
    axes.set_ylim(bottom=0)


PANELS = (
    Panel(lambda log: True, _draw_loss, _finish_loss),
    Panel(lambda log: bool(log.series(TEMPERATURE)[0]), _draw_temperature, _finish_temperature),
    Panel(lambda log: bool(log.series(EXPERTS)[0]), _draw_experts, _finish_experts),
    Panel(lambda log: bool(seconds_per_update(log)[0]), _draw_time, _finish_time),
)
