"""Schedules: pure functions of the number of completed updates, so that a restart at any update
continues exactly."""

import math

TEMPERATURE_SCHEDULES = ("linear", "exp", "cosine", "constant")


def temperature(
    num_updates: int, *, start: float, end: float, updates: int, schedule: str
) -> float:
    """Temperature of the dense-to-sparse gate after `num_updates` updates
    (EvoMoE, arXiv 2112.14397; linear in the paper, exp in its code).

    Args:
        num_updates: completed updates, from 0.
        start: temperature at update 0.
        end: temperature from update `updates` on, except for the constant schedule.
        updates: length of the annealing in updates.
        schedule: linear; exp (equal ratios); cosine (half a period); constant (always `start`).
    """
    if schedule == "constant":
        return start
    if num_updates >= updates:
        return end
    done = num_updates / updates
    if schedule == "linear":
        return start + (end - start) * done
    if schedule == "exp":
        return start * (end / start) ** done
    if schedule == "cosine":
        return end + (start - end) * (1 + math.cos(math.pi * done)) / 2
    raise ValueError(f"unknown schedule {schedule}: one of {', '.join(TEMPERATURE_SCHEDULES)}")
