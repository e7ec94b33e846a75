"""A few cases of each part of the campaign, and what the campaign itself promises."""

import json
import os
import time
import types

import pytest

from tests.torture import damage, disks, faults, forked, harness, kills, report, tiny
from tests.torture.harness import Outcome
from tests.torture.run import PARTS


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    tiny.warm_up()
    return tmp_path_factory.mktemp("torture")


SMOKE = [(part, seed) for part in PARTS for seed in part.smoke()]


@pytest.mark.distributed
@pytest.mark.parametrize(("part", "seed"), SMOKE, ids=[f"{p.NAME}-{s}" for p, s in SMOKE])
def test_smoke(part, seed, work, monkeypatch):
    # All layouts would train for minutes; the cases of these seeds are of the first.
    monkeypatch.setattr(kills, "prepare", lambda work: None)
    monkeypatch.setattr(damage, "prepare", lambda work: None)
    part.prepare(work)
    outcome = harness.judged(part, seed, work)
    assert not outcome.fault, f"{outcome.kind}: {outcome.fault}"


def part_of(outcomes, draw=1):
    tried = []

    def case(seed, _work):
        tried.append(seed)
        return outcomes[seed]

    part = types.SimpleNamespace(
        NAME="part", TITLE="A part", CASES=5, DRAW=draw, case=case, prepare=lambda work: None
    )
    return part, tried


def test_a_killed_campaign_goes_on(tmp_path):
    outcomes = {n: Outcome("good") for n in range(4)} | {1: Outcome("bad", "a fault")}
    part, tried = part_of(outcomes)
    results = tmp_path / "results"
    list(harness.run(part, [0, 1], tmp_path, results, time.monotonic() + 60))
    file = results / "part.jsonl"
    file.write_text(file.read_text() + '{"seed": 2, "ki')  # killed while it wrote
    history = harness.read(part, results)
    assert sorted(history.last) == [0, 1] and history.left == [1] and not history.mended
    assert history.sessions[0].commit.rstrip("+") in harness.commit()
    outcomes[1] = Outcome("good")
    file.write_text(file.read_text() + "\n")
    list(harness.run(part, [1, 2, 3], tmp_path, results, time.monotonic() + 60))
    history = harness.read(part, results)
    assert tried == [0, 1, 1, 2, 3] and history.mended == [1] and not history.left
    assert not harness.read(part_of({}, draw=2)[0], results).last
    assert list(harness.run(part, [4], tmp_path, results, time.monotonic() - 1)) == []


def test_a_case_that_raises_has_failed(tmp_path):
    part, _ = part_of({})
    assert harness.judged(part, 7, tmp_path).fault == "KeyError: 7"
    assert not list((tmp_path / "cases").iterdir())


def test_the_report_has_only_what_was_run(tmp_path):
    part, _ = part_of({0: Outcome("good"), 1: Outcome("bad", "a | fault")})
    part.__doc__ = "What it breaks.\n\nMore."
    docs, page = tmp_path / "docs.md", tmp_path / "page.md"
    docs.write_text(f"before\n{report._BEGIN}\nyesterday's\n{report._END}\nafter\n")
    results = tmp_path / "results"
    list(harness.run(part, [0, 1], tmp_path, results, time.monotonic() + 60))
    report.write([part], results, docs, page)
    assert "| A part | 5 | 2 | 1 | 0 | 1 |" in docs.read_text()
    assert docs.read_text().startswith("before\n") and docs.read_text().endswith("after\n")
    text = page.read_text()
    assert (
        "Not reached: 3 of 5 cases." in text
        and "a \\| fault" in text
        and "yesterday" not in docs.read_text()
    )
    assert 'make torture ARGS="--part part --case 1"' in text


def test_children_report_their_end(tmp_path):
    assert forked.call(lambda: {"a": 1}).value == {"a": 1}
    assert forked.call(lambda: os._exit(3)).status == 3
    assert forked.call(lambda: time.sleep(60), timeout=0.2).timed_out
    ended = forked.call(lambda: [bytes(2**30) for _ in range(4)], memory=2**30)
    assert "MemoryError" in ended.output and "a traceback" in disks.verdict(ended)


def test_faults_strike_at_their_number(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    counters = faults.Counters()

    def write(fault=None):
        faults.watch_disk(folder, fault, counters)
        (tmp_path / "elsewhere").write_bytes(b"abcd")  # is not counted
        for name in ("a", "b"):
            with open(folder / name, "wb") as file:
                file.write(b"abcd")
                os.fsync(file.fileno())
            os.replace(folder / name, folder / f"{name}{name}")

    assert forked.call(write).status == 0
    assert counters.values()[0] == 8
    counters = faults.Counters()
    killed = forked.call(lambda: write(faults.Kill(6)))
    assert killed.status == -9
    assert (folder / "aa").read_bytes() == b"abcd" and (folder / "b").read_bytes() == b"ab"
    counters = faults.Counters()
    failed = forked.call(lambda: write(faults.Error(4, 0, 28, ("replace",), lasting=False)))
    assert "No space left" in failed.output and (folder / "a").exists()
    assert json.dumps(counters.values()[:2]) == "[4, 0]"
