"""Plot the ratios."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from speed.report import LABELS

MOST = 6.0  # larger ratios are drawn at the edge, so that the others are readable


def draw(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Time over the limit's for every contender in every case, with its range.

    Args:
        path: .svg or .png.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = [result for result in results if "limit_seconds" in result]
    kinds = sorted({(result["dtype"], result["threads"]) for result in results})
    names = [
        name
        for name in LABELS
        if name != "Routing" and any(name in result["rows"] for result in results)
    ]
    most_cases = max(sum((r["dtype"], r["threads"]) == kind for r in results) for kind in kinds)
    figure, axes = plt.subplots(
        1,
        len(kinds),
        squeeze=False,
        layout="constrained",
        figsize=(max(8, 5 * len(kinds)), 2 + 0.42 * most_cases),
    )
    colours = {**dict(zip(names, plt.cm.tab20.colors, strict=False)), "Ours": "black"}
    for axis, (dtype, threads) in zip(axes[0], kinds, strict=True):
        members = [r for r in results if (r["dtype"], r["threads"]) == (dtype, threads)]
        for y, result in enumerate(members):
            for name in names:
                if name not in result["rows"]:
                    continue
                of = result["rows"][name]["of_limit"]
                middle = min(of["median"], MOST)
                ends = [
                    [middle - min(of["low"], middle)],
                    [max(min(of["high"], MOST), middle) - middle],
                ]
                axis.errorbar(
                    middle,
                    y,
                    xerr=ends,
                    color=colours[name],
                    label=LABELS[name],
                    fmt="D" if name == "Ours" else ">" if of["median"] > MOST else "o",
                    markersize=7 if name == "Ours" else 4,
                    zorder=3 if name == "Ours" else 2,
                )
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title(f"{dtype}, {threads} threads")
        axis.set_xlabel("time / limit (bare matmuls)")
        axis.set_yticks(range(len(members)), [result["name"] for result in members], fontsize=7)
        axis.invert_yaxis()
        axis.set_xlim(0.8 if dtype == "fp32" else 0, MOST + 0.2)
        axis.grid(axis="x", linewidth=0.3)
    handles: dict[str, Any] = {}
    for axis in axes[0]:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)
