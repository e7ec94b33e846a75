import itertools
import math

import pytest

from evomoe_plugin.routing.schedules import TEMPERATURE_SCHEDULES, temperature

ANNEAL = {"start": 2.0, "end": 0.5, "updates": 1000}


@pytest.mark.parametrize("schedule", ["linear", "exp", "cosine"])
def test_starts_high_falls_and_stays_at_the_end(schedule):
    course = [temperature(n, schedule=schedule, **ANNEAL) for n in range(0, 1200, 50)]
    assert course[0] == 2.0
    assert all(a >= b for a, b in itertools.pairwise(course))
    assert course[20:] == [0.5] * 4


@pytest.mark.parametrize(
    "schedule, quarter",
    [
        ("linear", 1.625),
        ("exp", 2 * 0.25**0.25),
        ("cosine", 0.5 + 1.5 * (1 + math.cos(math.pi / 4)) / 2),
    ],
)
def test_values_on_the_way(schedule, quarter):
    assert temperature(250, schedule=schedule, **ANNEAL) == pytest.approx(quarter)


def test_constant_never_changes():
    assert {temperature(n, schedule="constant", **ANNEAL) for n in (0, 999, 10**6)} == {2.0}


def test_no_annealing_is_at_the_end_at_once():
    assert temperature(0, start=2.0, end=0.5, updates=0, schedule="linear") == 0.5


def test_unknown_schedule_names_those_there_are():
    with pytest.raises(ValueError, match="|".join(TEMPERATURE_SCHEDULES)):
        temperature(1, schedule="step", **ANNEAL)
