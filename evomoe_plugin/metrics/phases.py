"""Phases of a run: one expert before the spawn, dense after it, sparse at the end."""

from __future__ import annotations

import itertools
import statistics
from dataclasses import dataclass

from evomoe_plugin.metrics.log import Record, TrainingLog
from evomoe_plugin.metrics.steps import seconds_per_update

EXPERTS = "experts_per_token"
ACTIVE = "active_experts"
# Relative difference in experts per token within a phase.
_NEAR = 0.05


@dataclass(frozen=True)
class Phase:
    """Consecutive intervals with about the same number of experts per token."""

    first_update: int
    """End of the first interval, in updates."""
    last_update: int
    """End of the last interval."""
    experts_per_token: float
    """Mean."""
    mflops_per_token: float | None
    """Mean of one forward pass, if logged."""
    seconds_per_update: float | None
    """Median over the intervals, if logged."""


def one_expert_start(log: TrainingLog) -> Phase | None:
    """The intervals before the spawn, with one expert; None without a spawn."""
    return _phase(log, _before_spawn(log)) if spawn_update(log) is not None else None


def dense_start(log: TrainingLog) -> Phase | None:
    """The first intervals of the run or after the spawn; None without experts per token."""
    spawned = spawn_update(log) or 0
    return _phase(log, [r for r in log.intervals if EXPERTS in r.values and r.update > spawned])


def sparse_end(log: TrainingLog) -> Phase | None:
    """The last intervals of the run; None without experts per token."""
    return _phase(log, [r for r in reversed(log.intervals) if EXPERTS in r.values])


def spawn_update(log: TrainingLog) -> int | None:
    """The update after which experts were spawned; None if the log begins later or ends earlier.

    Exact if a log interval ends there, otherwise the end of that interval.
    """
    single = _before_spawn(log)
    if not single or len(single) == len(log.intervals):
        return None
    # `active_experts` is logged only before the spawn: here for a part of the interval.
    after = log.intervals[len(single)]
    return after.update if ACTIVE in after.values else single[-1].update


def _before_spawn(log: TrainingLog) -> list[Record]:
    """The initial intervals with one active expert."""
    return list(
        itertools.takewhile(
            lambda r: r.values.get(ACTIVE) == 1 and r.values.get(EXPERTS) == 1, log.intervals
        )
    )


def _phase(log: TrainingLog, records: list[Record]) -> Phase | None:
    if not records:
        return None
    experts = records[0].values[EXPERTS]
    near = sorted(
        itertools.takewhile(lambda r: abs(r.values[EXPERTS] - experts) <= _NEAR * experts, records),
        key=lambda record: record.update,
    )
    seconds = dict(zip(*seconds_per_update(log), strict=True))
    measured = [seconds[r.update] for r in near if r.update in seconds]
    mflops = [r.values["mflops_per_token"] for r in near if "mflops_per_token" in r.values]
    before = [r.update for r in log.intervals if r.update < near[0].update]
    return Phase(
        first_update=max(before, default=0) + 1,
        last_update=near[-1].update,
        experts_per_token=statistics.fmean(r.values[EXPERTS] for r in near),
        mflops_per_token=statistics.fmean(mflops) if mflops else None,
        seconds_per_update=statistics.median(measured) if measured else None,
    )


def annealing_end(log: TrainingLog) -> int | None:
    """The update from which the temperature is constant; None if it still changes, or never did.

    Exact if a log interval begins there, otherwise the beginning of the next interval.
    """
    return _constant_from(*log.series("temperature"))


def top1_start(log: TrainingLog) -> int | None:
    """The update from which each token has one expert; None if that is not reached."""
    updates, values = log.series(EXPERTS)
    return _constant_from(updates, values) if values and values[-1] == 1.0 else None


def _constant_from(updates: list[int], values: list[float]) -> int | None:
    steady = len(list(itertools.takewhile(lambda value: value == values[-1], reversed(values))))
    # A single interval is not enough: the last value always equals itself.
    return updates[-steady - 1] if 2 <= steady < len(values) else None
