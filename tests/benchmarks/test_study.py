"""The study's harness: order of runs, learning rates, results, report, resuming."""

import dataclasses
import json
import math
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))
sys.path.append(str(ROOT / "examples/quickstart"))

from study import comparison, learning_rates, report, results, run, runs, texts, verses  # noqa: E402
from study.attempt import Attempt, RunFolder  # noqa: E402
from study.miniature import TRANSLATION  # noqa: E402
from study.results import Result  # noqa: E402
from study.systems import SMOKE, STUDY, System  # noqa: E402

from evomoe_plugin.metrics.log import parse_log  # noqa: E402

GRID = (1e-3, 2e-3, 4e-3)


def test_the_learning_rate_is_the_best_of_the_grid_or_one_step_beyond():
    assert learning_rates.wanted(GRID, {2e-3: 9.0}) == [1e-3, 4e-3]
    inside = {1e-3: 9.0, 2e-3: 8.0, 4e-3: math.nan}
    assert learning_rates.wanted(GRID, inside) == []
    assert learning_rates.choose(inside) == learning_rates.Choice(2e-3, at_edge=False)
    falling = {1e-3: 9.0, 2e-3: 8.0, 4e-3: 7.0}
    assert learning_rates.wanted(GRID, falling) == [8e-3]
    assert learning_rates.wanted(GRID, {1e-3: 7.0, 2e-3: 8.0, 4e-3: math.inf}) == [0.5e-3]
    assert learning_rates.wanted(GRID, falling | {8e-3: 6.0}) == []
    assert learning_rates.choose(falling | {8e-3: 6.0}) == learning_rates.Choice(8e-3, at_edge=True)
    assert not learning_rates.choose(falling | {8e-3: 7.5}).at_edge


RECIPE = (
    System("lexical", "switch", "lexical", ("a=1",), 3, 0, True),
    System("lexical_half", "switch", "lexical", ("a=1",), 3, 0, True, share=0.5),
    System("lexical_without_a", "switch", "lexical", ("a=0",), importance=2, ablates="a"),
)
NAMES = ("dense", "switch", "hash", "gshard")
SMALL = dataclasses.replace(
    STUDY,
    systems=(*RECIPE, *(STUDY.system(name) for name in NAMES)),
    grid=GRID,
    representatives={"dense": "dense", "learned": "switch", "table": "hash", "lexical": "lexical"},
)


def made(one: runs.Run, perplexity: float, study=SMALL, **more) -> Result:
    """A result whose test perplexity halves from four times its end in four evaluations."""
    updates = one.updates(study)
    at = [updates // 4 * i for i in (1, 2, 3, 4)]
    column = [perplexity * factor for factor in (4, 2, 1.5, 1)]
    values = dict(
        system=one.system.name,
        text=one.text,
        seed=one.seed,
        lr=one.lr,
        updates=updates,
        settings=one.settings(study),
        data="text",
        curve={
            "update": at,
            "valid_ppl": column,
            "test_ppl": column,
            "tera_flops": [u / 100 for u in at],
            "cpu_seconds": [u / 10 for u in at],
        },
        training={"update": at, "load_max": [2.0] * 4},
        wall_seconds=400.0,
        cpu_seconds=300.0,
        attempts=[{"commit": "c" * 40, "dirty": False, "start": "2026-11-30T10:00:00+00:00"}],
        command="fairseq-hydra-train",
        machine={"cpu": "a cpu", "python": "3.11"},
        packages={"torch": "2"},
    )
    return Result(**(values | more))


# Best at 2e-3; seeds differ by 0.2.
FINAL = {"dense": 40, "switch": 36, "hash": 34, "gshard": 35, "lexical": 30, "lexical_half": 35}


def trained(folder: Path, study=SMALL, final=FINAL, leave_out=()) -> None:
    """Write results of all declared runs, as the queue would."""
    while True:
        grid = results.grid_perplexities(study, folder)
        left = [
            one
            for one in runs.ready(study, grid)
            if results.current(one, study, folder) is None
            and (one.system.name, one.text, one.seed) not in leave_out
        ]
        if not left:
            return
        one = left[0]
        tuned = abs(math.log2(one.lr / 2e-3))
        perplexity = final.get(one.system.name, 33) + tuned + 0.2 * (one.seed - 2)
        made(one, perplexity, study).write(results.path_of(one, folder))


def test_the_grid_is_trained_first_then_what_is_most_important(tmp_path):
    first = runs.ready(SMALL, {})
    assert [(r.system.name, r.lr, r.text, r.seed) for r in first] == [
        (name, lr, "prose", 1) for name in ("dense", "switch", "hash", "lexical") for lr in GRID
    ]
    trained(tmp_path)
    grid = results.grid_perplexities(SMALL, tmp_path)
    order = runs.ready(SMALL, grid)
    assert len(set(order)) == len(order) and runs.undecided(SMALL, grid) == []
    later = [(r.system.name, r.text, r.seed) for r in order[12:]]
    declared = {
        (system.name, text, seed + 1)
        for system in SMALL.systems
        for text in SMALL.texts
        for seed in range(system.seeds)
    }
    in_grid = [(name, "prose", 1) for name in SMALL.representatives.values()]
    assert sorted(later) == sorted(declared - set(in_grid))
    assert all(r.lr == 2e-3 for r in order[12:])
    assert later[0] == ("lexical_half", "prose", 1)
    assert later.index(("switch", "code", 2)) < later.index(("hash", "prose", 3))
    assert later.index(("hash", "code", 3)) < later.index(("gshard", "prose", 1))


def test_a_family_without_its_grid_waits():
    grid = {"dense": dict.fromkeys(GRID, 9.0) | {2e-3: 8.0}}
    ready = {one.system.name for one in runs.ready(SMALL, grid)}
    assert "gshard" not in ready
    waiting = [(s.name, text, seed) for s, text, seed in runs.undecided(SMALL, grid)]
    assert ("gshard", "prose", 1) in waiting and ("switch", "code", 1) in waiting
    assert ("switch", "prose", 1) not in waiting and ("dense", "code", 1) not in waiting


@pytest.mark.parametrize("study", run.STUDIES.values(), ids=run.STUDIES)
def test_every_declared_name_and_override_is_one_of_the_configurations(study):
    names = [system.name for system in study.systems]
    assert len(set(names)) == len(names)
    assert {s.family for s in study.systems} == set(study.representatives)
    for system in study.systems:
        assert (ROOT / f"hydra_configs/small/{system.config}.yaml").exists()
    assert study.save_interval % study.evaluate_interval == 0
    assert {name for pair in study.expected for name in pair} <= set(names)


def test_a_crossing_is_interpolated_in_the_logarithm():
    costs, perplexities = [0.0, 10.0, 20.0], [800.0, 400.0, 100.0]
    assert comparison.crossing(costs, perplexities, 200.0) == pytest.approx(15.0)
    assert comparison.crossing(costs, perplexities, 100.0) == pytest.approx(20.0)
    assert comparison.crossing(costs, perplexities, 99.0) is None
    assert comparison.crossing([5.0, 10.0], [90.0, 80.0], 100.0) == 5.0
    assert comparison.crossing([None, *costs], [None, *perplexities], 800.0) == 0.0


def line(update: int, **values) -> str:
    return json.dumps({**{k: str(v) for k, v in values.items()}, "num_updates": str(update)})


def evaluated(update: int, valid: float, test: float, **routing) -> list[str]:
    def summary(subset, **values):
        return json.dumps({f"{subset}_{name}": value for name, value in values.items()})

    return [
        summary("valid", ppl=valid, **routing, num_updates=update),
        summary("test", ppl=test, num_updates=update),
    ]


def test_a_result_counts_updates_once_and_all_attempts():
    study = dataclasses.replace(SMOKE, updates=4)
    one = runs.Run(study.system("switch"), "tiny", 2e-3, 1)
    flops = {1: 7.0, 2: 5.0, 3: 1.0, 4: 1.0}

    def interval(update, loss):
        return line(update, loss=loss, wpb=100, mflops_per_token=flops[update])

    log = parse_log(
        [
            interval(1, 9.0),
            interval(2, 8.0),
            *evaluated(2, 70.0, 71.0),
            interval(3, 1.0),  # lost: the attempt was killed after the checkpoint of update 2
            interval(3, 7.0),
            interval(4, 6.0),
            *evaluated(4, 60.0, 61.0, stability=0.5),
        ]
    )
    first, second = {"attempt": 1}, {"attempt": 2}
    costs = [
        {**first, "wall": 0.0, "cpu": 0.0, "code": {"commit": "a", "dirty": False}},
        {**first, "wall": 3.0, "cpu": 2.0, "update": 1, "after": 0, "train_cpu": 0.5},
        {**first, "wall": 4.0, "cpu": 2.5, "update": 2, "after": 1, "train_cpu": 0.25},
        {**first, "wall": 5.0, "cpu": 3.0, "update": 3, "after": 2, "train_cpu": 9.0},
        {**second, "wall": 0.0, "cpu": 0.0, "code": {"commit": "b", "dirty": True}},
        {**second, "wall": 3.0, "cpu": 2.0, "update": 3, "after": 2, "train_cpu": 0.5},
        {**second, "wall": 4.0, "cpu": 2.5, "update": 4, "after": 3, "train_cpu": 0.75},
        {**second, "wall": 6.0, "cpu": 3.5},
    ]
    found = results.collect(one, study, log, costs, "text", ["train"])
    million = 3 * 100 * 1e6 / 1e12
    assert found.curve == {
        "update": [2, 4],
        "valid_ppl": [70.0, 60.0],
        "test_ppl": [71.0, 61.0],
        "tera_flops": [round(12 * million, 4), round(14 * million, 4)],
        "cpu_seconds": [0.75, 2.0],
        "stability": [None, 0.5],
    }
    assert found.training["loss"] == [9.0, 8.0, 7.0, 6.0]
    assert (found.wall_seconds, found.cpu_seconds) == (11.0, 6.5)
    assert [attempt["commit"] for attempt in found.attempts] == ["a", "b"]
    log.intervals.pop()
    assert results.collect(one, study, log, costs, "text", ["train"]) is None
    diverged = results.collect(one, study, log, costs, "text", ["train"], diverged=True)
    assert diverged.test_perplexity == math.inf


def test_results_of_other_settings_do_not_count(tmp_path):
    trained(tmp_path)
    changed = dataclasses.replace(SMALL.system("switch"), overrides=("model.x=1",))
    systems = tuple(changed if s.name == "switch" else s for s in SMALL.systems)
    study = dataclasses.replace(SMALL, systems=systems)
    compared = comparison.compare(study, tmp_path, "prose")
    assert {system.name for system in compared.undecided} == {"switch", "gshard"}
    assert "switch" not in compared.by_system and "hash" in compared.by_system


def test_a_win_needs_every_criterion_and_every_seed(tmp_path):
    def met(folder, **more):
        trained(folder, **more)
        found = comparison.verdicts(comparison.compare(SMALL, folder, "code"))
        return [verdict.met for verdict in found]

    # Faster than Switch, 8 % below dense, below Switch, below hash.
    assert met(tmp_path / "a") == [True, True, True, True]
    assert met(tmp_path / "b", final=FINAL | {"lexical_half": 36.1}) == [False, True, True, True]
    assert met(tmp_path / "c", final=FINAL | {"lexical": 34.5}) == [True, True, True, False]
    assert met(tmp_path / "d", final=FINAL | {"dense": 32.5}) == [True, False, True, True]
    without = met(tmp_path / "e", leave_out=[("hash", "code", 2)])
    assert without == [True, True, True, None]


def test_the_report_gives_every_number_its_spread_and_names_what_is_missing(tmp_path):
    trained(tmp_path, leave_out=[("switch", "code", 3), ("gshard", "prose", 1)])
    page = report.write(SMALL, tmp_path, tmp_path / "out").read_text()
    prose, code = page.split("## Prose")[1].split("## Code")
    table = prose.split("### Final perplexity")[1].split("###")[0]
    rows = {row.split(" | ")[0].strip("| "): row for row in table.splitlines() if row[:2] == "| "}
    assert "30.00 ± 0.20" in rows["lexical"] and "-25.0 ± 0.1" in rows["lexical"]
    # Seeds end at 29.8, 30 and 30.2; Switch's 36 lies between that and 1.5 times that.
    expected = [1500 + 500 * math.log(1.5 * p / 36) / math.log(1.5) for p in (29.8, 30.0, 30.2)]
    assert f"| {comparison.Spread(tuple(expected)).shown(0)} |" in rows["lexical"]
    assert "32.80 (n=1)" in rows["lexical_without_a"]
    assert "never" in rows["dense"]
    assert "Missing: gshard seed 1." in prose and "Missing: switch seed 3." in code
    assert "not known yet" in code and "not decided" in code
    for picture in ("prose-curves", "prose-final", "code-curves", "code-final"):
        assert "<svg" in (tmp_path / f"out/2026-11-30-study-{picture}.svg").read_text()
    with pytest.raises(SystemExit, match="no results"):
        report.write(SMALL, tmp_path / "nothing", tmp_path)


def test_cpu_times_of_another_processor_do_not_count(tmp_path):
    trained(tmp_path)
    first = comparison.compare(SMALL, tmp_path, "code").by_system["switch"][0]
    elsewhere = dataclasses.replace(first, machine={"cpu": "another", "python": "3.11"})
    elsewhere.write(tmp_path / f"code/switch-lr{first.lr:g}-seed{first.seed}.json")
    compared = comparison.compare(SMALL, tmp_path, "code")
    assert compared.processor == "a cpu"
    assert len(compared.by_system["switch"]) == len(compared.cpu_seconds("switch").values) + 1
    assert compared.crossings("switch", 1e9, "cpu_seconds").count(None) == 1
    assert None not in compared.crossings("switch", 1e9, "update")


def test_the_miniature_reports_what_was_expected_and_bleu(tmp_path):
    final = {"dense": 40, "switch": 36, "lexical": 30, "dts": 35, "evomoe": 34.9}
    for one in runs.ready(TRANSLATION, {}):
        bleu = {"test_bleu": [None, 1.0, 2.0, 50 - final[one.system.name]]}
        result = made(one, final[one.system.name], TRANSLATION)
        columns = {f"{side}_experts_per_token": [1.5] for side in ("encoder", "decoder")}
        result = dataclasses.replace(
            result, curve=result.curve | bleu, training={"update": [600], **columns}
        )
        result.write(results.path_of(one, tmp_path))
    page = report.write(TRANSLATION, tmp_path, tmp_path / "out")
    assert page.name == "2026-11-30-study-translation.md"
    text = page.read_text()
    assert "4 of 5 found, 1 not, 0 not decided. One seed decides none" in text
    rows = {row.split(" | ")[0].strip("| "): row for row in text.splitlines() if row[:2] == "| "}
    assert "missed" in rows["evomoe ends at least 1% below dts"]
    assert "| 30.00 (n=1) | 20.00 (n=1) |" in rows["lexical"]
    assert "1.50 (n=1)" in rows["evomoe decoder"]


def test_verses_are_read_from_a_module_of_sword(tmp_path):
    blocks = [b"In <note>x <w>y</w></note>the <w lemma='a'>beginning</w>,  God", b"<l>And</l>."]
    packed = [zlib.compress(block) for block in blocks]
    starts = [0, len(packed[0])]
    places = [(0, 0, len(blocks[0])), (0, 0, 0), (1, 0, len(blocks[1]))]
    (tmp_path / "ot.bzz").write_bytes(b"".join(packed))
    (tmp_path / "ot.bzs").write_bytes(
        b"".join(
            struct.pack("<III", start, len(of), len(block))
            for start, of, block in zip(starts, packed, blocks, strict=True)
        )
    )
    (tmp_path / "ot.bzv").write_bytes(b"".join(struct.pack("<IIH", *place) for place in places))
    assert list(verses.read_entries(tmp_path / "ot")) == ["In the beginning, God", "", "And."]


def test_prose_is_split_at_ends_of_sentences():
    text = 'One two. "Three?" Four five!  Six\nSeven. Eight'
    found = list(texts.documents(text, 12))
    assert found == ['One two. "Three?"', "Four five! Six\nSeven.", "Eight"]
    assert " ".join(found).split() == text.split()


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """A queue of the smoke study whose text is not needed."""
    monkeypatch.setattr(texts, "prepare", lambda text, work: tmp_path)
    monkeypatch.setattr(texts, "fingerprint", lambda data: "text")
    return run.Queue(SMOKE, tmp_path, tmp_path / "results", [], [])


def trains_with(monkeypatch, script: str) -> None:
    """Have runs execute a script instead: `system` and `folder` are its variables."""

    def command(self, study, data, folder):
        given = f"system, folder = {self.system.name!r}, {str(folder)!r}\n"
        return [sys.executable, "-c", given + script]

    monkeypatch.setattr(runs.Run, "command", command)


LOG = "\n".join([line(u, wpb=1, mflops_per_token=1) for u in (1, 2, 3, 4)] + evaluated(4, 60, 61))


def test_a_run_that_fails_does_not_stop_the_queue(queue, monkeypatch, capsys):
    trains_with(monkeypatch, f"assert system != 'dense', 'no memory'\nprint('''{LOG}''')")
    queue.work_off(jobs=1, hours=1)
    assert [one.system.name for one in queue.failed] == ["dense"]
    assert "no memory" in capsys.readouterr().out
    (left,) = queue.results.glob("*/*.json")
    assert results.read(left).test_perplexity == 61
    # Its family waits for the next call, which tries again.
    queue.failed.clear()
    assert [one.system.name for one in queue.left()] == ["dense"]
    assert "1 done, 1 left" in queue.overview(jobs=2)


def test_a_run_that_diverges_is_a_result(queue, monkeypatch):
    error = "error: decoder.layers.1.moe: gate logits are NaN/Inf for 256 tokens"
    trains_with(monkeypatch, f"print('{error}'); raise SystemExit(1)")
    queue.work_off(jobs=2, hours=1)
    assert not queue.failed and not queue.left()
    page = report.write(SMOKE, queue.results, queue.work).read_text()
    assert "| diverged |" in page and "Diverged after update 0: switch seed 1." in page


def test_no_run_starts_after_the_given_hours(queue, monkeypatch):
    trains_with(monkeypatch, "raise SystemExit(1)")
    queue.work_off(jobs=1, hours=0)
    assert not queue.failed


def test_a_run_is_trained_by_one_process_and_its_costs_are_measured(queue, monkeypatch, tmp_path):
    trains_with(monkeypatch, f"sum(range(10**7)); print('''{LOG}''', flush=True); input()")
    one = queue.left()[0]
    attempt = Attempt(one, SMOKE, tmp_path, tmp_path, "text")
    attempt.start()
    assert RunFolder(one, tmp_path).is_locked() and queue._start(one) is None
    while attempt.poll() is None:
        time.sleep(0.05)
    assert attempt.result().cpu_seconds > 0
    attempt.close()
    assert not RunFolder(one, tmp_path).is_locked()
    # What is left of a run of other settings is deleted.
    Attempt(one, SMOKE, tmp_path, tmp_path, "another text").close()
    assert RunFolder(one, tmp_path).update() == 0


@pytest.mark.slow
def test_the_study_goes_on_after_it_was_killed(tmp_path):
    def start(*arguments):
        script = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks/study/run.py")]
        return subprocess.Popen(
            [*script, "--smoke", "--work", str(tmp_path), *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )

    log = tmp_path / "runs/tiny/switch-lr0.002-seed1/train.log"
    first = start("--only", "switch")
    until = time.monotonic() + 120
    while not (log.exists() and "Saved checkpoint" in log.read_text()):
        assert first.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    out, _ = start().communicate(timeout=240)
    assert "switch-lr0.002-seed1: goes on" in out and "0 runs left" in out
    found = json.loads((tmp_path / "smoke-results/tiny/switch-lr0.002-seed1.json").read_text())
    assert len(found["attempts"]) == 2 and found["training"]["update"] == [1, 2, 3, 4]
    assert found["curve"]["update"] == [2, 4] and found["curve"]["cpu_seconds"][1] > 0
    assert "Loaded checkpoint" in log.read_text()
    page = report.write(SMOKE, tmp_path / "smoke-results", tmp_path).read_text()
    assert "| dense |" in page and "went on from a checkpoint" in page
