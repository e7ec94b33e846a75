"""Time per update, from two clocks of limited accuracy."""

import pytest

from evomoe_plugin.metrics import parse_log, seconds_per_update
from evomoe_plugin.metrics.steps import training_flops, training_seconds
from tests.metrics.logs import interval


def measured(*lines):
    return dict(zip(*seconds_per_update(parse_log(lines)), strict=True))


def test_the_fine_clock_is_taken_where_the_coarse_one_allows_it():
    # 10 updates of 1000 words at 800 words a second: 1.25 s each; 12.5 s round to 12
    assert measured(
        interval(10, wpb=1000, wps=800, train_wall=12), interval(20, wpb=1000, wps=800)
    ) == {10: pytest.approx(1.25), 20: pytest.approx(1.25)}


def test_validation_and_resumption_do_not_count():
    # the interval lasted 60 s, of which 3 (2.5 to 3.5) were training
    assert measured(interval(10, wpb=1000, wps=10_000 / 60, train_wall=3)) == {
        10: pytest.approx(0.35)
    }


def test_without_the_fine_clock_the_coarse_one_is_taken():
    assert measured(interval(10, train_wall=4)) == {10: pytest.approx(0.4)}
    assert measured(interval(10, train_wall=0)) == {}  # anything below half a second


def test_a_log_without_clocks_gives_nothing():
    assert measured(interval(10, loss=9), interval(20, wps=0, wpb=10)) == {}


def test_intervals_may_differ_in_length_and_begin_late():
    # resumed into a new log at update 1000, then an interval of 20
    assert measured(
        interval(1010, train_wall=10), interval(1020, train_wall=10), interval(1040, train_wall=10)
    ) == {1010: pytest.approx(1), 1020: pytest.approx(1), 1040: pytest.approx(0.5)}


def test_flops_and_seconds_add_up_from_the_beginning_of_the_log():
    values = {"wpb": 100, "wps": 50, "mflops_per_token": 3}
    log = parse_log([interval(n, **values) for n in (30, 40, 50)])  # a resumed run's
    assert training_flops(log) == {30: 9e9, 40: 18e9, 50: 27e9}
    assert training_seconds(log) == {30: 20.0, 40: 40.0, 50: 60.0}
    assert training_flops(parse_log([interval(10, wpb=100)])) == {}
    stacks = {
        f"{stack}_{name}": value
        for stack, value in (("encoder", 1), ("decoder", 2))
        for name in ("experts_per_token", "mflops_per_token")
    }
    assert training_flops(parse_log([interval(10, wpb=100, **stacks)])) == {10: 9e9}
