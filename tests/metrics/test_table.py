"""The summary tables match the log."""

import io

from rich.console import Console

from evomoe_plugin.metrics import parse_log
from evomoe_plugin.metrics.table import closing_table, course_table
from tests.metrics.logs import diversified, evolution, interval


def shown(table) -> list[str]:
    console = Console(file=io.StringIO(), width=100)
    console.print(table)
    return [" ".join(line.split()) for line in console.file.getvalue().splitlines()]


def test_closing_table():
    lines = shown(closing_table(evolution(), {"test perplexity": ("4,000", "50.1")}))
    assert "dense start sparse end" in lines
    assert "test perplexity 4,000 50.1" in lines
    assert "experts per token 7.97 1.00" in lines
    assert "time per update (median) 0.85 s 0.15 s (5.7 times as fast)" in lines
    assert "forward MFLOPs per token 10.0 3.0" in lines
    assert "measured over updates 1 to 30 61 to 100" in lines


def test_one_expert_before_the_dense_start():
    lines = shown(closing_table(diversified(), {"test perplexity": ("4,000", "50.1")}))
    assert "one expert dense start sparse end" in lines
    assert "test perplexity 4,000 50.1" in lines
    assert "experts per token 1.00 8.00 1.00" in lines
    assert "time per update (median) 0.50 s 0.50 s 0.50 s (1.0 times as fast)" in lines
    assert "forward MFLOPs per token 3.0 10.0 3.0" in lines
    assert "measured over updates 1 to 30 31 to 50 71 to 100" in lines
    course = shown(course_table(diversified(), columns=4))
    assert "temperature 2.00 1.00 0.10" in course and "experts/token 1.00 8.00 4.00 1.00" in course


def test_course_table_goes_from_first_to_last():
    lines = shown(course_table(evolution(), columns=4))
    assert "updates 10 40 70 100" in lines
    assert "experts/token 8.00 5.00 1.00 1.00" in lines
    assert "temperature 2.00 0.60 0.10 0.10" in lines
    assert "seconds/update 0.85 0.55 0.15 0.15" in lines
    assert not any(line.startswith("dead experts") for line in lines)  # not logged


def test_course_of_a_single_interval():
    assert "updates 10" in shown(course_table(parse_log([interval(10, ppl=30)])))
