"""Compare results: spreads over seeds, crossings of curves, the declared criteria."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from study import learning_rates, results
from study.results import Result
from study.runs import Run
from study.systems import Study, System

SHARE_OF_UPDATES = 1 / 2
SHARE_OF_FLOPS = 1 / 1.42
BELOW_DENSE = 0.08
"""A win: what the recipe under test must reach (README.md)."""


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float:
        """0 for a single value."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    def shown(self, digits: int, sign: str = "") -> str:
        """`mean ± deviation`; a single value is marked."""
        mean = f"{self.mean:{sign}.{digits}f}"
        if len(self.values) == 1:
            return f"{mean} (n=1)"
        return f"{mean} ± {self.deviation:.{digits}f}"


def spread(values: Iterable[float | None]) -> Spread | None:
    """Of the finite values; None if there is none."""
    known = tuple(v for v in values if v is not None and math.isfinite(v))
    return Spread(known) if known else None


@dataclass(frozen=True)
class Compared:
    """The results of one text, with the chosen learning rates."""

    study: Study
    text: str
    by_system: dict[str, list[Result]]
    """Current results in order of seeds, of systems that have any."""
    missing: tuple[Run, ...]
    """Declared runs without a current result."""
    undecided: tuple[System, ...]
    """Systems whose learning rate is not chosen yet."""
    processor: str | None
    """The one that most of the study's runs were trained on. CPU times of others do not count."""

    def costs(self, result: Result, cost: str) -> list[float | None]:
        """A column of the run's curve: `update`, `tera_flops` or `cpu_seconds`.

        CPU seconds are None for a run on another processor than `processor`.
        """
        column = result.curve[cost]
        if cost == "cpu_seconds" and result.machine["cpu"] != self.processor:
            return [None] * len(column)
        return column

    def cpu_seconds(self, name: str) -> Spread | None:
        """Of training, on `processor`."""
        columns = [self.costs(r, "cpu_seconds") for r in self.by_system.get(name, ())]
        return spread(column[-1] for column in columns if column)

    def perplexity(self, name: str) -> Spread | None:
        """Final, on the test part."""
        return spread(result.test_perplexity for result in self.by_system.get(name, ()))

    def bleu(self, name: str) -> Spread | None:
        """Final, on the test part."""
        return spread(result.test_bleu for result in self.by_system.get(name, ()))

    def is_complete(self, name: str) -> bool:
        """Whether the system has all its declared seeds, each with a finite perplexity."""
        found = self.perplexity(name)
        return found is not None and len(found.values) == self.study.system(name).seeds

    def percent(self, name: str, base: str) -> Spread | None:
        """Final perplexity relative to that of another system with the same seed, in percent."""
        bases = {r.seed: r.test_perplexity for r in self.by_system.get(base, ())}
        return spread(
            100 * (r.test_perplexity / bases[r.seed] - 1)
            for r in self.by_system.get(name, ())
            if r.seed in bases
        )

    def crossings(self, name: str, target: float, cost: str) -> list[float | None]:
        """Cost of each seed at which its test perplexity first reaches the target, or None.

        Args:
            cost: as in `costs`.
        """
        return [
            crossing(self.costs(r, cost), r.curve["test_ppl"], target)
            for r in self.by_system.get(name, ())
        ]


def compare(study: Study, folder: Path, text: str) -> Compared:
    """Collect the results of a text."""
    processors = Counter(r.machine["cpu"] for r in results.all_current(study, folder))
    processor = max(processors, key=lambda name: (processors[name], name), default=None)
    grid = results.grid_perplexities(study, folder)
    by_system: dict[str, list[Result]] = {}
    missing, undecided = [], []
    for system in study.systems:
        tried = grid.get(system.family, {})
        if learning_rates.wanted(study.grid, tried):
            undecided.append(system)
            continue
        lr = learning_rates.choose(tried).lr
        for seed in range(1, system.seeds + 1):
            run = Run(system, text, lr, seed)
            result = results.current(run, study, folder)
            if result is None:
                missing.append(run)
            else:
                by_system.setdefault(system.name, []).append(result)
    return Compared(study, text, by_system, tuple(missing), tuple(undecided), processor)


def crossing(
    costs: Sequence[float | None], perplexities: Sequence[float | None], target: float
) -> float | None:
    """The cost at which perplexity first reaches the target; None if it never does.

    Between two evaluations the logarithm of the perplexity is taken as linear in the cost. A curve
    that starts below the target has reached it at its first evaluation.
    """
    before: tuple[float, float] | None = None
    for cost, perplexity in zip(costs, perplexities, strict=True):
        if cost is None or perplexity is None:
            continue
        if perplexity <= target:
            if before is None:
                return cost
            share = math.log(before[1] / target) / math.log(before[1] / perplexity)
            return before[0] + share * (cost - before[0])
        before = cost, perplexity
    return None


@dataclass(frozen=True)
class Verdict:
    """A declared criterion on one text."""

    criterion: str
    measured: str
    met: bool | None
    """None: runs are missing."""


def verdicts(compared: Compared, recipe: str = "lexical") -> list[Verdict]:
    """The declared criteria, by means over the declared seeds."""
    if compared.study.expected:
        margin = compared.study.margin
        return [_below(compared, a, b, margin) for a, b in compared.study.expected]
    half = f"{recipe}_half"
    rivals = [
        system.name
        for system in compared.study.systems
        if system.equal_flops and system.family != compared.study.system(recipe).family
    ]
    return [
        _faster(compared, half),
        _below(compared, recipe, "dense", BELOW_DENSE),
        *(_below(compared, recipe, rival, 0.0) for rival in rivals if rival != "dense"),
    ]


def _faster(compared: Compared, half: str) -> Verdict:
    criterion = (
        f"{half} ends after at most {SHARE_OF_UPDATES:.0%} of the updates and "
        f"1/{1 / SHARE_OF_FLOPS:.2f} of the training FLOPs at or below Switch's final perplexity"
    )
    if not (compared.is_complete(half) and compared.is_complete("switch")):
        return Verdict(criterion, "runs are missing", None)
    ours, theirs = compared.perplexity(half), compared.perplexity("switch")
    flops, of = (
        statistics.fmean(r.tera_flops for r in compared.by_system[name])
        for name in (half, "switch")
    )
    updates, of_updates = (compared.by_system[name][0].updates for name in (half, "switch"))
    return Verdict(
        criterion,
        f"{updates} of {of_updates} updates, {flops / of:.3f} of the FLOPs: "
        f"{ours.shown(2)}, Switch {theirs.shown(2)}",
        ours.mean <= theirs.mean
        and updates <= SHARE_OF_UPDATES * of_updates
        and flops <= SHARE_OF_FLOPS * of,
    )


def _below(compared: Compared, recipe: str, rival: str, by: float) -> Verdict:
    criterion = f"{recipe} ends " + f"at least {by:.0%} " * bool(by) + f"below {rival}"
    if not (compared.is_complete(recipe) and compared.is_complete(rival)):
        return Verdict(criterion, "runs are missing", None)
    ours, theirs = compared.perplexity(recipe), compared.perplexity(rival)
    percent = compared.percent(recipe, rival)
    return Verdict(
        criterion,
        f"{ours.shown(2)}, {rival} {theirs.shown(2)}: {percent.shown(1, '+')} % by seed",
        ours.mean <= (1 - by) * theirs.mean if by else ours.mean < theirs.mean,
    )
