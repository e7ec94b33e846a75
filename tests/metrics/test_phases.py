"""Dense start, sparse end, and the updates in between where routing changes."""

import pytest

from evomoe_plugin.metrics import dense_start, one_expert_start, parse_log, sparse_end
from evomoe_plugin.metrics.phases import annealing_end, spawn_update, top1_start
from tests.metrics.logs import diversified, evolution, interval


def test_the_ends_of_an_evolution():
    start, end = dense_start(evolution()), sparse_end(evolution())
    assert (start.first_update, start.last_update) == (1, 30)
    assert (end.first_update, end.last_update) == (61, 100)
    assert start.experts_per_token == pytest.approx((8 + 8 + 7.9) / 3)
    assert start.seconds_per_update == pytest.approx(0.85)  # the median, not the mean
    assert (end.experts_per_token, end.mflops_per_token) == (1.0, 3.0)
    assert end.seconds_per_update == pytest.approx(0.15)


def test_one_slow_interval_does_not_count():
    log = evolution()
    log.add(interval(110, experts_per_token=1, wpb=1000, wps=100, train_wall=100))
    assert sparse_end(log).seconds_per_update == pytest.approx(0.15)


def test_a_run_without_experts_has_no_phases():
    log = parse_log([interval(10, loss=9)])
    assert dense_start(log) is None and sparse_end(log) is None
    assert annealing_end(log) is None and top1_start(log) is None


def test_marks_are_where_the_gate_changed():
    assert annealing_end(evolution()) == 60
    assert top1_start(evolution()) == 60


def test_what_still_goes_on_has_no_mark():
    # the last value is 1 expert, once: the next may be 1.2
    log = parse_log(
        [interval(10 * i, temperature=2 - 0.1 * i, experts_per_token=8 - i) for i in range(1, 8)]
    )
    assert annealing_end(log) is None and top1_start(log) is None


def test_what_never_changes_has_no_mark():
    log = parse_log([interval(10 * i, temperature=1, experts_per_token=1) for i in range(1, 5)])
    assert annealing_end(log) is None and top1_start(log) is None


def test_both_phases_of_evomoe():
    log = diversified()
    assert (spawn_update(log), annealing_end(log), top1_start(log)) == (30, 70, 70)
    phases = one_expert_start(log), dense_start(log), sparse_end(log)
    assert [(p.first_update, p.last_update, p.experts_per_token) for p in phases] == [
        (1, 30, 1),
        (31, 50, 8),
        (71, 100, 1),
    ]
    assert [p.mflops_per_token for p in phases] == [3, 10, 3]


def test_a_spawn_within_an_interval():
    log = diversified(interval_of=20)
    assert spawn_update(log) == 40
    assert one_expert_start(log).last_update == 20
    start = dense_start(log)
    assert (start.first_update, start.last_update, start.experts_per_token) == (41, 60, 6)


@pytest.mark.parametrize(
    "logged",
    [
        {"experts_per_token": 1},
        {"experts_per_token": 1, "active_experts": 1},
        {"experts_per_token": 2, "active_experts": 4},
    ],
)
def test_without_a_spawn_the_start_is_the_dense_one(logged):
    """Hard routing; inactive experts; a changing number of experts."""
    log = parse_log([interval(10 * i, **logged) for i in range(1, 4)])
    assert spawn_update(log) is None and one_expert_start(log) is None
    assert dense_start(log).first_update == 1


def test_a_spawn_with_hard_routing_is_found_by_active_experts():
    before = [interval(10 * i, experts_per_token=1, active_experts=1) for i in (1, 2)]
    log = parse_log(before + [interval(10 * i, experts_per_token=1) for i in (3, 4)])
    assert spawn_update(log) == 20 and top1_start(log) is None
    assert one_expert_start(log).last_update == 20 and dense_start(log).first_update == 21
