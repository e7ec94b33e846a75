"""`evomoe plot --experts`: heat maps of the experts' loads over updates, one for each MoE layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.metrics.log import TrainingLog
from evomoe_plugin.metrics.plot import new_figure, save

_COLUMNS = 4


def plot_experts(logs: Sequence[TrainingLog], out: str | Path) -> None:
    """Plot the loads of one run into a file; its suffix selects the format.

    Raises:
        OptionError: there are several runs, the log has no loads, matplotlib is missing, or the
            file cannot be written.
    """
    if len(logs) > 1:
        raise OptionError("experts", f"with {len(logs)} logs", "give one log")
    (log,) = logs
    if not log.experts:
        raise OptionError(
            "experts", log.name, "its run logged no loads: train with --moe-log-experts"
        )
    out = Path(out)
    figure = new_figure(out)
    names = list(log.experts[-1].loads)
    layers = [[record.loads.get(name) for record in log.experts] for name in names]
    updates = [record.update for record in log.experts]
    columns = min(len(layers), _COLUMNS)
    rows = math.ceil(len(layers) / columns)
    figure.set_size_inches(3.6 * columns + 1, 2.6 * rows + 0.8)
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid[len(layers) :]:
        axes.remove()
    high = 3 / max(len(load_E) for loads in layers for load_E in loads if load_E)
    for name, loads, axes in zip(names, layers, grid, strict=False):
        width = max((len(load_E) for load_E in loads if load_E), default=1)
        shares = [load_E or [math.nan] * width for load_E in loads]
        edges = [updates[0] - (updates[1] - updates[0] if updates[1:] else updates[0]), *updates]
        mesh = axes.pcolormesh(
            edges,
            [e - 0.5 for e in range(width + 1)],
            [list(column) for column in zip(*shares, strict=True)],
            cmap="viridis",
            vmin=0,
            vmax=high,
        )
        axes.set(title=name, xlabel="updates", ylabel="expert")
        axes.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(mesh, ax=grid[: len(layers)], label="share of the layer's pairs", extend="max")
    save(figure, out)
