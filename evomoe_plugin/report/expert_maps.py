"""What `--moe-log-experts` and validations logged of each MoE layer, as heat maps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evomoe_plugin.metrics.log import ExpertRecord, TrainingLog
from evomoe_plugin.report.heat_map import HeatMap, is_known

_MOST_CELLS, _MOST_COLUMNS, _FEWEST_COLUMNS = 20_000, 50, 10

_OF_LAYERS = {
    "experts_per_token": "experts per token",
    "entropy": "entropy of the gate (nats)",
    "dropped": "pairs dropped by the capacity, per token",
    "null": "null experts per token",
}
_OF_VALIDATIONS = {
    "stability": "stability: tokens with the same first expert as before",
    "purity": "purity: tokens with the commonest expert of their id",
    "combine_weight": "sum of a token's combine weights",
}


@dataclass(frozen=True)
class Group:
    """Heat maps of one kind."""

    title: str
    explanation: str
    maps: list[HeatMap]


def expert_maps(log: TrainingLog) -> list[Group]:
    """Heat maps over updates; groups without any are left out."""
    load, weight = list(_of_experts(log))
    layers = Group("Layers", "", [*_of_layers(log), *_of_validations(log)])
    return [group for group in (load, weight, layers) if group.maps]


def _of_experts(log: TrainingLog) -> Iterator[Group]:
    records, updates, layers = _kept(log)
    widest = max(
        (len(load_E) for r in records[-1:] for load_E in r.loads.values() if load_E), default=1
    )
    for name, title, explanation in (
        ("load", "Load", "Share of its layer's pairs that each expert had."),
        ("weight", "Combine weight", "Mean over the pairs of each expert; grey: it had none."),
    ):
        values = {n: [record.of(name).get(n) or [] for record in records] for n in layers}
        high = 3 / widest if name == "load" else _highest(values.values())
        maps = [
            HeatMap(layer, "expert", "update", updates, columns, high, name == "load")
            for layer, columns in values.items()
            if any(columns)
        ]
        yield Group(title, explanation, maps)


def _kept(log: TrainingLog) -> tuple[list[ExpertRecord], list[int], list[str]]:
    """Records, as many as a page can draw, their updates, and the layers' names."""
    if not log.experts:
        return [], [], []
    loads = log.experts[-1].loads
    cells = sum(len(load_E or ()) for load_E in loads.values())
    most = min(max(_MOST_CELLS // max(cells, 1), _FEWEST_COLUMNS), _MOST_COLUMNS)
    records = log.experts[::-1][:: math.ceil(len(log.experts) / most)][::-1]
    return records, [record.update for record in records], list(loads)


def _of_layers(log: TrainingLog) -> Iterator[HeatMap]:
    records, updates, _ = _kept(log)
    for name, title in _OF_LAYERS.items():
        maps = {s: [record.layers.get(s + name, []) for record in records] for s in log.stacks}
        yield from _drawn(title, updates, maps, _highest(maps.values()))


def _of_validations(log: TrainingLog) -> Iterator[HeatMap]:
    for subset in log.subsets:
        for name, title in _OF_VALIDATIONS.items():
            updates = sorted(
                {n for stack in log.stacks for n in log.series(stack + name, subset)[0]}
            )
            maps = {}
            for stack in log.stacks:
                rows = _rows(log, stack + name, subset)
                maps[stack] = [[row.get(update) for row in rows] for update in updates]
            high = 1.0 if name != "combine_weight" else _highest(maps.values())
            of_subset = "" if len(log.subsets) == 1 else f", {subset}"
            yield from _drawn(title + of_subset, updates, maps, high)


def _rows(log: TrainingLog, name: str, subset: str) -> list[dict[int, float]]:
    """Update -> value of each layer."""
    rows: list[dict[int, float]] = []
    while (series := log.series(f"{name}_{len(rows)}", subset))[0]:
        rows.append(dict(zip(*series, strict=True)))
    return rows


def _drawn(
    title: str, updates: Sequence[int], maps: Mapping[str, Any], high: float
) -> Iterator[HeatMap]:
    for stack, columns in maps.items():
        if any(columns):
            of_stack = f"{stack.rstrip('_')}, " if stack else ""
            yield HeatMap(of_stack + title, "layer", "update", updates, columns, high)


def _highest(maps: Any) -> float:
    return max(
        (value for columns in maps for column in columns for value in column if is_known(value)),
        default=1.0,
    )
