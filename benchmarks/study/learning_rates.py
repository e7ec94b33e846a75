"""The rule by which a family's peak learning rate is chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """The learning rate of a family."""

    lr: float
    at_edge: bool
    """It is the least or the greatest of those tried: a better one may lie beyond."""


def wanted(grid: Sequence[float], perplexity: Mapping[float, float]) -> list[float]:
    """Learning rates that must be tried before one is chosen.

    The grid; then, once, one step beyond an edge that is the best of the grid.

    Args:
        grid: ascending; steps are factors of 2.
        perplexity: final validation perplexity of those tried; infinite or NaN if it diverged.
    """
    missing = [lr for lr in grid if lr not in perplexity]
    if missing or len(grid) == 1:
        return missing
    best = _best(grid, perplexity)
    beyond = {grid[0]: grid[0] / 2, grid[-1]: grid[-1] * 2}.get(best)
    return [] if beyond is None or beyond in perplexity else [beyond]


def choose(perplexity: Mapping[float, float]) -> Choice:
    """The learning rate with the lowest perplexity; of equals, the lower rate."""
    tried = sorted(perplexity)
    best = _best(tried, perplexity)
    return Choice(best, len(tried) > 1 and best in (tried[0], tried[-1]))


def _best(tried: Sequence[float], perplexity: Mapping[float, float]) -> float:
    # NaN is never less than anything, so `min` alone would keep it.
    return min(tried, key=lambda lr: (not perplexity[lr] < float("inf"), perplexity[lr], lr))
