"""Time and FLOPs of training, from fairseq's log."""

from __future__ import annotations

import itertools

from evomoe_plugin.metrics.log import TrainingLog


def seconds_per_update(log: TrainingLog) -> tuple[list[int], list[float]]:
    """Updates, and the mean seconds per update in the interval that ends there.

    fairseq logs two times. `train_wall` covers training steps only, but in whole seconds.
    `wpb / wps` is precise, but includes everything else in the interval: reading data, validation,
    saving, and the start of a resumed run. The second is used, clamped to the rounding interval of
    the first.
    """
    updates, seconds = [], []
    for record, length in zip(log.intervals, interval_lengths(log), strict=True):
        wps, wpb = record.values.get("wps", 0), record.values.get("wpb", 0)
        fine = wpb / wps if wps > 0 and wpb > 0 else None
        coarse = record.values.get("train_wall")
        if coarse is None:
            found = fine
        elif fine is None:
            found = coarse / length or None  # 0 may be anything below half a second
        else:
            found = min(max(fine, (coarse - 0.5) / length), (coarse + 0.5) / length)
        if found is not None:
            updates.append(record.update)
            seconds.append(found)
    return updates, seconds


def interval_lengths(log: TrainingLog) -> list[int]:
    """Updates in each interval. The beginning of the first may not be in the log."""
    ends = [record.update for record in log.intervals]
    differences = [b - a for a, b in itertools.pairwise(ends)]
    return [min([ends[0], *differences]), *differences] if ends else []


def training_flops(log: TrainingLog) -> dict[int, float]:
    """Update -> FLOPs of training until then, three forward passes of what was routed.

    From the beginning of the log; empty where an interval has none logged. A source sentence counts
    as if it were as long as its translation, since only the tokens of the latter are logged.
    """
    total, found = 0.0, {}
    names = [f"{stack}mflops_per_token" for stack in log.stacks]
    for record, length in zip(log.intervals, interval_lengths(log), strict=True):
        values = record.values
        of_stacks = [values[name] for name in names if name in values]
        if not of_stacks or "wpb" not in values:
            return {}
        total += 3e6 * sum(of_stacks) * values["wpb"] * length
        found[record.update] = total
    return found


def training_seconds(log: TrainingLog) -> dict[int, float]:
    """Update -> seconds of training until then, from the beginning of the log."""
    updates, seconds = seconds_per_update(log)
    if len(updates) != len(log.intervals):
        return {}
    spent = itertools.accumulate(n * s for n, s in zip(interval_lengths(log), seconds, strict=True))
    return dict(zip(updates, spent, strict=True))
