"""Ratios, goals and tables from seconds."""

import argparse
import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from speed import clock, goals, report
from speed.cases import CASES, QUICK, Case, chosen
from speed.forks import forked
from speed.results import Results


def test_ratios_are_taken_within_a_round():
    assert clock.ratios([2.0, None, 9.0], [1.0, 1.0, 3.0]) == [2.0, 3.0]
    assert clock.spread([3.0, 1.0, 2.0])["median"] == 2.0
    assert clock.spread([3.0])["low"] == 3.0


def test_a_slow_step_is_measured_in_few_rounds(monkeypatch):
    taken = {"bound": 1.0, "slow": clock.SLOW + 1.0}
    monkeypatch.setattr(clock, "seconds", lambda step, device: taken[step()])
    times = clock.take_turns({name: lambda name=name: name for name in taken}, 5, "cpu", "bound")
    assert times == {
        "bound": [1.0] * 5,
        "slow": [taken["slow"]] * clock.FEW + [None] * (5 - clock.FEW),
    }


def test_a_fork_says_why_it_failed():
    def fails():
        raise ValueError("no\nsecond line")

    assert forked(lambda: {"pid": 1}) == {"pid": 1}
    assert forked(fails) == {"failed": "ValueError: no"}


def test_results_are_gone_on_with_only_where_asked(tmp_path):
    args = argparse.Namespace(json=tmp_path / "found.json", resume=False)
    Results(args, {"rounds": 7}).add({"name": "a", "threads": 1})
    with pytest.raises(SystemExit, match="--resume"):
        Results(args, {})
    args.resume = True
    again = Results(args, {})
    assert again.has(name="a", threads=1) and not again.has(name="a", threads=2)
    again.add({"name": "b", "threads": 1})
    assert [one["name"] for one in json.loads(args.json.read_text())["results"]] == ["a", "b"]
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]


def test_cases_are_chosen_by_parts_of_their_names():
    assert chosen(None, quick=True) == list(QUICK)
    assert all(case.group == "annealing" for case in chosen(["annealing"], quick=False))
    with pytest.raises(SystemExit, match="--cases nothing"):
        chosen(["nothing"], quick=False)
    names = [case.name for case in (*CASES,)]
    assert len(set(names)) == len(names)
    assert Case("", 1, 512, 1).gated_ffn_dim == 1344


def row(ours, **others):
    """Rows of a result, ours and others, relative to limit and floor."""

    def numbers(value):
        spread = clock.spread([value])
        return {"of_limit": spread, "of_floor": spread, "ours_of_it": clock.spread([ours / value])}

    return {"Ours": numbers(ours), **{name: numbers(value) for name, value in others.items()}}


def layer(rows, rows_per_expert=1024, dtype="fp32"):
    return {
        "name": "a case",
        "gate": "top_k",
        "dtype": dtype,
        "threads": 1,
        "wanted": 0,
        "width": 512,
        "experts": 8,
        "rows_per_expert": rows_per_expert,
        "rows": rows,
        "memory": {"Ours": {"of_goal": 1.05}},
        "failed": {},
        "routing_share": clock.spread([0.05]),
    }


@pytest.mark.parametrize(
    ("ours", "loop", "status"),
    [
        (1.10, 1.2, {"1.12 of the limit": "**met**", "fastest": "**met**", "dense FFN": "missed"}),
        (1.13, 1.1, {"1.12 of the limit": "missed", "fastest": "missed", "dense FFN": "missed"}),
        (1.04, 1.1, {"1.12 of the limit": "**met**", "fastest": "**met**", "dense FFN": "**met**"}),
    ],
)
def test_goals_are_met_or_missed_by_the_numbers(ours, loop, status):
    found = {"layers": [layer(row(ours, Loop=loop, Dense=1.05))]}
    lines = goals.goals_table(found).splitlines()
    for words, expected in status.items():
        (line,) = (line for line in lines if words in line and "bf16" not in line)
        assert f"| {expected} |" in line
    assert sum("not measured" in line for line in lines) == len(goals.GOALS) - 5
    assert ("1.12 of the limit: 1.13 in a case" in goals.missed(found)) == (ours == 1.13)


def test_a_whole_step_is_held_against_the_best_of_the_peers():
    of = {"ours": 2.0, "HF slow": 5.0, "HF fast": 2.9}
    step = {
        "name": "a model",
        "dtype": "fp32",
        "threads": 1,
        "rows": {label: {"of_limit": clock.spread([value])} for label, value in of.items()},
    }
    (line,) = (
        line for line in goals.goals_table({"steps": [step]}).splitlines() if "whole step" in line
    )
    assert "missed" in line and "1.45" in line and "HF fast" in line


def test_those_who_do_not_take_part_are_named_with_the_reason():
    result = {**layer(row(1.1)), "failed": {"Fairscale": "its gate supports only top-2"}}
    assert "fairscale MOELayer: its gate supports only top-2: a case." in report.failures([result])
