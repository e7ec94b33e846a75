"""Markdown reports."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from speed.measure import CONTENDERS

LABELS = {"Floor": "floor", **{name: kind.label for name, kind in CONTENDERS.items()}}


def heading(machine: Mapping[str, str]) -> str:
    """Describe the machine."""
    return "; ".join(f"{name} {value}" for name, value in machine.items()) + "."


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def times_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Time over the limit's, for all contenders in all cases of one kind."""
    names = [
        name
        for name in LABELS
        if any(name in result["rows"] or name in result["failed"] for result in results)
        and name != "Routing"
    ]
    rows = []
    for result in results:
        cells = [
            result["name"],
            f"{result['rows_per_expert']:.0f} ({result['load_max']:.2f})",
            f"{result['limit_seconds'] * 1e3:.0f} ms, {result['limit_gflops']:.0f} GFLOP/s",
        ]
        rows.append([*cells, *(_cell(result, name) for name in names)])
    columns = ["case", "rows per expert (max/mean)", "limit", *(LABELS[name] for name in names)]
    return table(columns, rows)


def _cell(result: Mapping[str, Any], name: str) -> str:
    if name not in result["rows"]:
        return "–"
    of = result["rows"][name]["of_limit"]
    few = (
        f", {of['rounds']} rounds"
        if of["rounds"] < result["rows"]["Floor"]["of_limit"]["rounds"]
        else ""
    )
    return f"{of['median']:.2f} ({of['min']:.2f}–{of['max']:.2f}{few})"


def failures(results: Iterable[Mapping[str, Any]]) -> str:
    """Contenders without a result, by reason and cases."""
    reasons: dict[str, list[str]] = {}
    for result in results:
        for name, why in result["failed"].items():
            reasons.setdefault(f"{LABELS[name]}: {why}", []).append(result["name"])
    return "\n".join(
        f"- {reason}: {', '.join(dict.fromkeys(cases))}." for reason, cases in reasons.items()
    )


def memory_table(results: Iterable[Mapping[str, Any]]) -> str:
    """Peak memory of a step."""
    rows = [
        [
            f"{result['name']}, {result['dtype']}",
            LABELS[name],
            f"{used['beyond_mib']:.0f}",
            f"{used['of_goal']:.2f}",
        ]
        if "failed" not in used
        else [f"{result['name']}, {result['dtype']}", LABELS[name], "–", used["failed"]]
        for result in results
        for name, used in result["memory"].items()
    ]
    columns = ["case", "contender", "MiB beyond weights and their gradients", "over N·(F + 2D)"]
    return table(columns, rows)


def routing_table(results: Iterable[Mapping[str, Any]]) -> str:
    """Share of routing in our layer."""
    return table(
        ["case", "gate, plan, sort, losses: share of the layer"],
        [
            [
                f"{result['name']}, {result['dtype']}, {result['threads']} threads",
                f"{result['routing_share']['median']:.1%} ({result['routing_share']['min']:.1%}–"
                f"{result['routing_share']['max']:.1%})",
            ]
            for result in results
            if "routing_share" in result
        ],
    )


def nulls_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Time against the pairs remaining with null experts."""
    if not results:
        return ""
    rows = [
        [
            f"{row['name']}, {result['dtype']}, {result['threads']} threads",
            f"{row['pairs_ratio']:.3f}",
            *(
                f"{row[name]['median']:.3f} ({row[name]['min']:.3f}–{row[name]['max']:.3f})"
                for name in ("ours", "loop")
            ),
        ]
        for result in results
        for row in result["rows"]
    ]
    columns = ["case", "pairs relative to no null experts", "time of ours", "time of the loop"]
    return f"### Null experts\n\n{table(columns, rows)}"


def layers(results: Sequence[Mapping[str, Any]]) -> str:
    """All tables of layers."""
    kinds: dict[tuple, list[Mapping[str, Any]]] = {}
    for result in results:
        kinds.setdefault(
            (result["group"], result["dtype"], result["threads"], result["device"]), []
        ).append(result)
    parts = []
    for (group, dtype, threads, device), members in kinds.items():
        parts += [f"### {group}, {dtype}, {threads} threads, {device}", times_table(members)]
        if notes := failures(members):
            parts.append(notes)
    parts += [
        "### Peak memory of a step",
        memory_table(results),
        "### Share of routing",
        routing_table(results),
    ]
    return "\n\n".join(parts)
