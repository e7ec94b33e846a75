"""Plots of one text: curves over three costs, and final perplexities."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from study.comparison import Compared, Spread, spread
from study.results import Result

# Okabe and Ito's colours, which colour-blind readers tell apart; a system keeps its own.
COLOURS = {
    "lexical": "#D55E00",
    "lexical_half": "#D55E00",
    "lexical_annealed": "#F0A36B",
    "dense": "#000000",
    "switch": "#0072B2",
    "hash": "#009E73",
    "base_layers": "#56B4E9",
    "top_k2": "#CC79A7",
    "dts": "#E69F00",
    "dts_balanced": "#B8860B",
    "evomoe": "#8C564B",
    "dense_wide": "#7F7F7F",
}
_OTHER = "#A0A0A0"
_DASHED = ("lexical_half", "dense_wide")
_COSTS = {
    "update": "updates",
    "tera_flops": "training TFLOPs",
    "cpu_seconds": "CPU seconds of training, one thread",
}
# The first evaluations, where all are alike, would take most of the axis.
_TOP = 1.5
_TICKS = (1, 1.2, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 7, 8, 9)


def curves(compared: Compared, path: Path) -> None:
    """Test perplexity against updates, training FLOPs and CPU time, of systems with colours.

    Lines are means over seeds at each evaluation, bands one standard deviation.
    """
    drawn = {name: compared.by_system[name] for name in COLOURS if name in compared.by_system}
    drawn = drawn or compared.by_system
    figure = _figure((14, 5.2))
    panels = figure.subplots(1, 3, sharey=True)
    for axes, (cost, label) in zip(panels, _COSTS.items(), strict=True):
        for name, found in drawn.items():
            runs = [(compared.costs(r, cost), r) for r in found]
            _curve(axes, runs, _label(name, found), COLOURS.get(name, _OTHER))
        if compared.is_complete("switch"):
            target = compared.perplexity("switch").mean
            axes.axhline(target, color=COLOURS["switch"], linewidth=0.8, linestyle=":")
        axes.set(xlabel=label, yscale="log", xlim=(0, None))
        _style(axes)
    panels[0].set_ylabel(f"test perplexity, {compared.text}")
    _limit(panels[0], list(drawn.values()))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.suptitle(
        f"Test perplexity during training on {compared.text}. Lines: means over seeds; bands: one "
        "standard deviation; dotted: Switch at its end",
        fontsize=11,
    )
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
    _save(figure, path)


def final(compared: Compared, path: Path) -> None:
    """Final test perplexity of all systems, best first: seeds as points, means as bars."""
    means = {
        name: found
        for name in compared.by_system
        if (found := compared.perplexity(name)) is not None
    }
    order = sorted(means, key=lambda name: means[name].mean, reverse=True)
    figure = _figure((9, 0.34 * len(order) + 1.6))
    axes = figure.subplots()
    for y, name in enumerate(order):
        colour, value = COLOURS.get(name, _OTHER), means[name]
        axes.plot(value.values, [y] * len(value.values), "o", color=colour, markersize=4)
        if len(value.values) > 1:
            axes.errorbar(value.mean, y, xerr=value.deviation, color=colour, capsize=4, marker="|")
        axes.annotate(
            value.shown(2), (1.01, y), xycoords=axes.get_yaxis_transform(), va="center", fontsize=8
        )
    axes.set_yticks(range(len(order)), [_label(n, compared.by_system[n]) for n in order])
    for name in ("dense", "switch"):
        if name in means:
            axes.axvline(means[name].mean, color=COLOURS[name], linewidth=0.8, linestyle=":")
    axes.set(
        xlabel=f"final test perplexity, {compared.text} (points: seeds; bars: mean ± standard "
        "deviation; dotted: dense, switch)"
    )
    _style(axes)
    _save(figure, path)


_Costs = list[float | None]


def _curve(axes: Any, runs: list[tuple[_Costs, Result]], label: str, colour: str) -> None:
    """Draw one system's mean; an evaluation counts where the seed's cost is known."""
    found = [result for _, result in runs]
    points = []
    for i, update in enumerate(found[0].curve["update"]):
        known = [
            (costs[i], result.curve["test_ppl"][i])
            for costs, result in runs
            if result.curve["update"][i : i + 1] == [update] and costs[i] is not None
        ]
        x, y = spread(cost for cost, _ in known), spread(perplexity for _, perplexity in known)
        if x is not None and y is not None:
            points.append((x.mean, y))
    if not points:
        return
    xs = [x for x, _ in points]
    means = [y.mean for _, y in points]
    dashed = found[0].system in _DASHED
    width = 2.6 if found[0].system.startswith("lexical") else 1.5
    axes.plot(
        xs, means, color=colour, label=label, linewidth=width, linestyle="--" if dashed else "-"
    )
    if len(found) > 1:
        low, high = _band([y for _, y in points])
        axes.fill_between(xs, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.plot(xs[-1], means[-1], "o", color=colour, markersize=4)


def _band(values: list[Spread]) -> tuple[list[float], list[float]]:
    return [y.mean - y.deviation for y in values], [y.mean + y.deviation for y in values]


def _limit(axes: Any, drawn: list[list[Result]]) -> None:
    """Show from the best to somewhat above the worst final perplexity."""
    finals = [r.test_perplexity for found in drawn for r in found]
    finals = [value for value in finals if math.isfinite(value)]
    if finals:
        axes.set_ylim(0.97 * min(finals), _TOP * max(finals))


def _label(name: str, found: list[Result]) -> str:
    return f"{name} (n={len(found)})"


def _figure(size: tuple[float, float]) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained", facecolor="white")


def _style(axes: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    axes.grid(True, color="#e8e8e8", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_yscale() == "log":
        axes.yaxis.set_major_locator(LogLocator(subs=_TICKS))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())


def _save(figure: Any, path: Path) -> None:
    import matplotlib

    # No date and no random ids: the same results make the same SVG. Text is text: a third the size.
    metadata = {"Date": None} if path.suffix == ".svg" else {}
    with matplotlib.rc_context({"svg.hashsalt": path.stem, "svg.fonttype": "none"}):
        figure.savefig(path, format=path.suffix[1:], dpi=120, metadata=metadata)
