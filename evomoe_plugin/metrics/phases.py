"""The phases of an evolution: one expert, all of them from the spawn on, few at the end."""

from __future__ import annotations

import itertools
import statistics
from dataclasses import dataclass

from evomoe_plugin.metrics.log import Record, TrainingLog
from evomoe_plugin.metrics.steps import seconds_per_update

EXPERTS = "experts_per_token"
ACTIVE = "active_experts"
# Intervals whose experts per token lie this near to those of the run's first or last belong to it.
_NEAR = 0.05


@dataclass(frozen=True)
class Phase:
    """Consecutive intervals with about the same number of experts per token."""

    first_update: int
    last_update: int
    experts_per_token: float
    """Mean."""
    mflops_per_token: float | None
    """Mean of one forward pass, if logged."""
    seconds_per_update: float | None
    """Median over the intervals, if logged."""


def one_expert_start(log: TrainingLog) -> Phase | None:
    """The intervals before the spawn, in which one expert works; None if there was no spawn."""
    return _phase(log, _before_spawn(log)) if spawn_update(log) is not None else None


def dense_start(log: TrainingLog) -> Phase | None:
    """The intervals at the beginning of the run, or from the spawn on; None if they log no experts
    per token."""
    spawned = spawn_update(log) or 0
    return _phase(log, [r for r in log.intervals if EXPERTS in r.values and r.update > spawned])


def sparse_end(log: TrainingLog) -> Phase | None:
    """The intervals at the end of the run; None if it logs no experts per token."""
    return _phase(log, [r for r in reversed(log.intervals) if EXPERTS in r.values])


def spawn_update(log: TrainingLog) -> int | None:
    """The update after which experts were spawned from the one that worked; None if the log begins
    later, or ends before.

    Exact where an interval of the log ends there, else the next end of one.
    """
    single = _before_spawn(log)
    if not single or len(single) == len(log.intervals):
        return None
    # It is logged of the updates in which experts wait: here of a part of the interval.
    after = log.intervals[len(single)]
    return after.update if ACTIVE in after.values else single[-1].update


def _before_spawn(log: TrainingLog) -> list[Record]:
    """The intervals at the beginning in which one expert is in use."""
    return list(itertools.takewhile(
        lambda r: r.values.get(ACTIVE) == 1 and r.values.get(EXPERTS) == 1, log.intervals))


def _phase(log: TrainingLog, records: list[Record]) -> Phase | None:
    if not records:
        return None
    experts = records[0].values[EXPERTS]
    near = sorted(
        itertools.takewhile(lambda r: abs(r.values[EXPERTS] - experts) <= _NEAR * experts, records),
        key=lambda record: record.update,
    )
    seconds = dict(zip(*seconds_per_update(log), strict=True))
    return Phase(
        first_update=_start(log, near[0]) + 1,
        last_update=near[-1].update,
        experts_per_token=statistics.fmean(r.values[EXPERTS] for r in near),
        mflops_per_token=_mean([r.values.get("mflops_per_token") for r in near]),
        seconds_per_update=_median([seconds.get(r.update) for r in near]),
    )


def _start(log: TrainingLog, record: Record) -> int:
    """The update at which the interval of `record` began."""
    return max((r.update for r in log.intervals if r.update < record.update), default=0)


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def annealing_end(log: TrainingLog) -> int | None:
    """The update from which on the temperature no longer fell; None if it still does, or never did.

    Exact where an interval of the log begins there, else the next beginning of one.
    """
    return _settled(log, "temperature", lambda value, last: value == last)


def top1_start(log: TrainingLog) -> int | None:
    """The update from which on each token had one expert; None if it did not come to that."""
    return _settled(log, EXPERTS, lambda value, last: value == 1.0)


def _settled(log: TrainingLog, metric: str, holds) -> int | None:
    updates, values = log.series(metric)
    steady = list(itertools.takewhile(lambda v: holds(v, values[-1]), reversed(values)))
    # One interval alone at the last value says nothing: any last value equals itself.
    if len(steady) < 2 or len(steady) == len(values):
        return None
    return updates[len(values) - len(steady) - 1]
