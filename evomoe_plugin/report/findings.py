"""What stands out, in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from evomoe_plugin.metrics.log import TrainingLog
from evomoe_plugin.metrics.phases import EXPERTS, annealing_end, spawn_update, top1_start

if TYPE_CHECKING:
    from evomoe_plugin.report.routed_sample import LayerRouting, RoutedSample

COLLAPSED = 0.5  # of all pairs
ALIKE = 0.95  # cosine of weights
PURE = 0.95


def of_sample(sample: RoutedSample) -> list[str]:
    """Of the routing of a checkpoint."""
    return [f"{layer.label}: {text}" for layer in sample.layers for text in _of_layer(layer)]


def _of_layer(layer: LayerRouting) -> Iterable[str]:
    loads = layer.load_E
    dead = [e for e, load in enumerate(loads) if load == 0]
    if dead:
        yield f"{_experts(dead)} of {layer.experts} got no token of the sample."
    collapse = list(_collapse(loads))
    yield from collapse
    alike = [
        (i, j)
        for i, row in enumerate(layer.similarity_EE)
        for j, cosine in enumerate(row)
        if i < j and cosine > ALIKE
    ]
    if alike:
        pairs = ", ".join(f"{i} and {j}" for i, j in alike[:5])
        more = f" and {len(alike) - 5} more pairs" if len(alike) > 5 else ""
        yield f"nearly the same weights (cosine above {ALIKE}): experts {pairs}{more}."
    if layer.purity is not None and layer.purity > PURE and not collapse and layer.experts > 1:
        yield (
            f"a token's id decides its expert: {layer.purity:.0%} of the tokens go to the "
            "commonest expert of their id."
        )


def _collapse(loads: Sequence[float]) -> Iterable[str]:
    busiest = max(range(len(loads)), key=lambda e: (math.isfinite(loads[e]), loads[e]))
    if len(loads) > 1 and loads[busiest] > max(COLLAPSED, 2 / len(loads)):
        yield f"expert {busiest} has {loads[busiest]:.0%} of all pairs: routing has collapsed."


def _experts(numbers: Sequence[int]) -> str:
    listed = ", ".join(map(str, numbers[:8])) + (", …" if len(numbers) > 8 else "")
    return f"expert {listed}" if len(numbers) == 1 else f"{len(numbers)} experts ({listed})"


def of_run(log: TrainingLog) -> list[str]:
    """Of a training log."""
    last = log.intervals[-1]
    found = [f"{last.update:,} updates."]
    for subset in log.subsets:
        updates, perplexities = log.series("ppl", subset)
        if perplexities:
            best = min(range(len(perplexities)), key=perplexities.__getitem__)
            text = f"Perplexity on {subset}: {perplexities[-1]:.2f} at the end"
            if perplexities[best] < perplexities[-1]:
                text += f", {perplexities[best]:.2f} at its best (update {updates[best]:,})"
            found.append(text + ".")
    for find, text in _EVENTS.items():
        if (update := find(log)) is not None:
            found.append(f"{text} update {update:,}.")
    anneals = max(log.series(EXPERTS)[1], default=1) > 1
    if anneals and (update := top1_start(log)) is not None:
        found.append(f"Each token has one expert from update {update:,}.")
    bad = [record.update for record in log.intervals if not _finite(record.values.get("loss"))]
    if bad:
        found.append(f"The loss is not finite from update {bad[0]:,}.")
    for stack in log.stacks:
        where = f" in the {stack.rstrip('_')}" if stack else ""
        dead = last.values.get(stack + "dead_experts", 0.0)
        if dead > 0:
            found.append(f"{dead:.0%} of the experts{where} got no token in the last interval.")
        overflow = last.values.get(stack + "overflow", 0.0)
        if overflow > 0.01:
            found.append(
                f"Capacity dropped {overflow:.0%} of the pairs{where} in the last interval."
            )
    return found + list(_of_experts(log))


_EVENTS = {
    spawn_update: "Experts were spawned after",
    annealing_end: "The temperature is constant from",
}


def _of_experts(log: TrainingLog) -> Iterable[str]:
    """Of the last loads that were logged: which experts are dead, and since when."""
    if not log.experts:
        return
    last = log.experts[-1]
    selectable = last.of("experts")
    for layer, loads in last.loads.items():
        if not loads or selectable.get(layer, len(loads)) != len(loads):
            continue  # some are not there yet, or any more
        dead = [e for e, load in enumerate(loads) if load == 0]
        if dead:
            since = last.update
            for record in reversed(log.experts):
                earlier = record.loads.get(layer) or []
                if len(earlier) != len(loads) or any(earlier[e] for e in dead):
                    break
                since = record.update
            of = f"of {len(loads)} got no token in update {last.update:,}"
            yield f"{layer}: {_experts(dead)} {of}" + (
                f", nor in those logged since update {since:,}." if since < last.update else "."
            )
        yield from (f"{layer}: {text}" for text in _collapse(loads))


def _finite(value: float | None) -> bool:
    return value is None or math.isfinite(value)
