"""Plot a run: loss, temperature, experts per token, step time and stability over updates."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.metrics import panels
from evomoe_plugin.metrics.log import TrainingLog
from evomoe_plugin.metrics.phases import annealing_end, spawn_update, top1_start

_COLOURS = ("#2a6f97", "#c8553d", "#588157", "#8d6a9f", "#b08900", "#444444")
_GREY = "#6b6b6b"
_EVENTS = {
    spawn_update: "experts spawned",
    annealing_end: "annealing ends",
    top1_start: "top-1 starts",
}


def plot(logs: Sequence[TrainingLog], out: str | Path, smoothing: float = 0.6) -> None:
    """Plot one or more runs into a file; its suffix selects the format.

    Panels without data are omitted. The file is written atomically.

    Args:
        logs: runs, labelled by their names.
        smoothing: weight of the moving average of the loss, in [0, 1).
    Raises:
        OptionError: matplotlib is missing, the file cannot be written, or an option is invalid.
    """
    if not 0 <= smoothing < 1:
        raise OptionError("smoothing", smoothing, "give a number from 0 (none) to below 1")
    out = Path(out)
    figure = new_figure(out)
    _draw(figure, logs, smoothing)
    save(figure, out)


def new_figure(out: Path) -> Any:
    """An empty figure that can be saved as `out`."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise OptionError("out", out, "needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(11, 7), layout="constrained", facecolor="white")
    kinds = sorted(figure.canvas.get_supported_filetypes())
    if out.suffix[1:].lower() not in kinds:
        raise OptionError("out", out, f"use a suffix among .{', .'.join(kinds)}")
    if not out.absolute().parent.is_dir():
        raise OptionError("out", out, f"no such folder: {out.absolute().parent}")
    return figure


def _draw(figure: Any, logs: Sequence[TrainingLog], smoothing: float) -> None:
    drawn = [panel for panel in panels.PANELS if any(panel.series(log)[0] for log in logs)]
    rows = math.ceil(len(drawn) / 2)
    figure.set_figheight(max(7, 3.5 * rows))
    grid = figure.subplots(rows, min(len(drawn), 2), squeeze=False).flat
    for axes in grid[len(drawn) :]:
        axes.remove()
    last = max(log.intervals[-1].update for log in logs)
    for panel, axes in zip(drawn, grid, strict=False):
        axes.set(xlabel="updates", ylabel=panel.label, xlim=(0, 1.01 * last), axisbelow=True)
        axes.grid(True, color="#e8e8e8", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        for log, colour in zip(logs, itertools.cycle(_COLOURS), strict=False):
            style = panels.Style(colour, smoothing, log.name if logs[1:] else "")
            panel.draw(axes, log, style)
        panel.finish(axes, logs)
        if len(logs) == 1:
            _mark_events(axes, logs[0], named=panel is drawn[0])
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)


def _mark_events(axes: Any, log: TrainingLog, named: bool) -> None:
    """Vertical lines at the spawn, the end of annealing and the start of top-1 routing."""
    marks: dict[int | None, list[str]] = {}
    for find, text in _EVENTS.items():
        marks.setdefault(find(log), []).append(text)
    marks.pop(None, None)
    for update, texts in marks.items():
        axes.axvline(update, color=_GREY, linewidth=1, linestyle=(0, (4, 3)))
        if named:
            axes.annotate(
                ", ".join(texts),
                (update, 1),
                xycoords=axes.get_xaxis_transform(),
                color=_GREY,
                xytext=(-4, -4),
                textcoords="offset points",
                rotation=90,
                fontsize=8,
                ha="right",
                va="top",
            )


def save(figure: Any, out: Path) -> None:
    """Save as `out`, completely or not at all."""
    part = out.with_name(f".{out.name}.part")
    try:
        figure.savefig(part, format=out.suffix[1:].lower(), dpi=150)
        part.replace(out)
    except OSError as error:
        raise OptionError("out", out, f"cannot be written ({error.strerror or error})") from None
    finally:
        part.unlink(missing_ok=True)
