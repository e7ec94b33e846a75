"""What stands out, in words."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from evomoe_plugin.metrics.log import TrainingLog

if TYPE_CHECKING:
    from evomoe_plugin.report.routed_sample import LayerRouting, RoutedSample

COLLAPSED = 0.5  # of all pairs
ALIKE = 0.95  # cosine of weights
PURE = 0.95


def of_sample(sample: RoutedSample) -> list[str]:
    """Of the routing of a checkpoint."""
    return [f"Layer {layer.layer}: {text}" for layer in sample.layers for text in _of_layer(layer)]


def _of_layer(layer: LayerRouting) -> Iterable[str]:
    loads = layer.load_E
    dead = [e for e, load in enumerate(loads) if load == 0]
    if dead:
        yield f"{_experts(dead)} of {len(loads)} got no token of the sample."
    busiest = max(range(len(loads)), key=loads.__getitem__)
    if len(loads) > 1 and loads[busiest] > max(COLLAPSED, 2 / len(loads)):
        yield f"expert {busiest} has {loads[busiest]:.0%} of all pairs: routing has collapsed."
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
    if layer.purity is not None and layer.purity > PURE and len(loads) - len(dead) > 1:
        yield (
            f"a token's id decides its expert: {layer.purity:.0%} of the tokens go to the "
            "commonest expert of their id."
        )


def _experts(numbers: list[int]) -> str:
    listed = ", ".join(map(str, numbers[:8])) + (", …" if len(numbers) > 8 else "")
    return f"expert {listed}" if len(numbers) == 1 else f"{len(numbers)} experts ({listed})"


def of_run(log: TrainingLog) -> list[str]:
    """Of a training log."""
    last = log.intervals[-1]
    found = [f"{last.update:,} updates."]
    for subset in sorted(log.summaries.keys() - {"train"}):
        updates, perplexities = log.series("ppl", subset)
        if perplexities:
            best = min(range(len(perplexities)), key=perplexities.__getitem__)
            text = f"Perplexity on {subset}: {perplexities[-1]:.2f} at the end"
            if perplexities[best] < perplexities[-1]:
                text += f", {perplexities[best]:.2f} at its best (update {updates[best]:,})"
            found.append(text + ".")
    bad = [record.update for record in log.intervals if not _finite(record.values.get("loss"))]
    if bad:
        found.append(f"The loss is not finite from update {bad[0]:,}.")
    dead = last.values.get("dead_experts", 0.0)
    if dead > 0:
        found.append(f"{dead:.0%} of the experts got no token in the last interval.")
    overflow = last.values.get("overflow", 0.0)
    if overflow > 0.01:
        found.append(f"Capacity dropped {overflow:.0%} of the pairs in the last interval.")
    return found


def _finite(value: float | None) -> bool:
    return value is None or math.isfinite(value)
