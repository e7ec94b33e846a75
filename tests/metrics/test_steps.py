"""Time per update, from two clocks of limited accuracy."""

import pytest

from evomoe_plugin.metrics import parse_log, seconds_per_update
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
