"""The quickstart: interrupted, resumed, run again, and refused."""

from __future__ import annotations

import email
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from evomoe_plugin.observe import read_log

ROOT = Path(__file__).parents[1]
RUN = ROOT / "examples/quickstart/run.py"
UPDATES = 200
TEXT = Path(email.__file__).parent  # more than the run sees once
LIMIT = 300


def arguments(folder: Path) -> list[str]:
    return [sys.executable, str(RUN), "--quick", "--updates", str(UPDATES), "--text", str(TEXT),
            "--dir", str(folder)]


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """The clone's own commands, also where the package is not installed."""
    commands = tmp_path_factory.mktemp("bin")
    evomoe = commands / "evomoe"
    evomoe.write_text(f"#!{sys.executable}\nimport sys\nfrom evomoe_plugin.cli import main\n"
                      "sys.exit(main())\n")
    evomoe.chmod(0o755)
    path = os.pathsep.join([str(commands), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore"}


@pytest.fixture(scope="module")
def quickstart(environment):
    def run(folder: Path, *more: str) -> subprocess.CompletedProcess:
        return subprocess.run([*arguments(folder), *more], env=environment, text=True,
                              capture_output=True, timeout=LIMIT, cwd=folder.parent)

    return run


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, environment) -> tuple[Path, int, str]:
    """The folder, exit status and output of a run that got Ctrl-C amid its training."""
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    process = subprocess.Popen(arguments(folder), env=environment, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output, deadline = "", time.monotonic() + LIMIT
    for line in process.stdout:
        output += line
        # Once the gate has begun to let go of experts, and a checkpoint is there.
        if line.split()[:1] == ["60"]:
            process.send_signal(signal.SIGINT)
        assert time.monotonic() < deadline, output
    return folder, process.wait(LIMIT), output


@pytest.fixture(scope="module")
def resumed(interrupted, quickstart) -> tuple[Path, int, subprocess.CompletedProcess]:
    """The folder, the update that was resumed from, and the run that resumed and finished."""
    folder, _, output = interrupted
    state = torch.load(folder / "checkpoints/checkpoint_last.pt", weights_only=False)
    return folder, state["optimizer_history"][-1]["num_updates"], quickstart(folder)


def test_ctrl_c_says_that_the_run_can_go_on(interrupted):
    folder, status, output = interrupted
    assert status == 130, output
    assert output.endswith("interrupted: run it again to go on from the last checkpoint\n")
    assert "Traceback" not in output
    assert read_log(folder / "train.log").intervals[-1].update < UPDATES


def test_run_again_it_goes_on(resumed):
    folder, update, run = resumed
    assert run.returncode == 0, run.stdout + run.stderr
    assert 0 < update < UPDATES
    assert f"interrupted after {update} of {UPDATES} updates: going on from there" in run.stdout
    log = read_log(folder / "train.log")
    assert [r.update for r in log.intervals] == list(range(5, UPDATES + 1, 5))
    assert log.intervals[0].values["experts_per_token"] > 7.9
    assert log.intervals[-1].values["experts_per_token"] == 1.0
    assert (folder / "run.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_tells_what_was_measured(resumed):
    folder, _, run = resumed
    rows = [line.split("  ") for line in run.stdout.splitlines()]
    cells = {row[0]: row[1:] for row in ([c.strip() for c in r if c.strip()] for r in rows) if row}
    before, after = (float(cell.replace(",", "")) for cell in cells["test perplexity"])
    for perplexity, log in [(before, "eval-first.log"), (after, "eval-last.log")]:
        found = re.findall(r"Perplexity: ([\d.]+)", (folder / log).read_text())
        assert [perplexity] == [pytest.approx(float(number), abs=0.06) for number in found]
    assert before > 1.5 * after > 1.5
    assert cells["experts per token"][1] == "1.00"
    assert "time per update (median)" in cells


def test_the_interruption_changed_nothing(resumed, environment, tmp_path):
    """The model of a single command that trains from the first update to the last is the same."""
    folder, _, run = resumed
    assert run.returncode == 0, run.stdout + run.stderr
    options = json.loads((folder / "settings.json").read_text())["train"]
    words = [word for option in options for word in option if word is not None]
    subprocess.run(
        [sys.executable, "-m", "fairseq_cli.train", str(folder / "data"), *words, "--save-dir",
         str(tmp_path), "--max-update", str(UPDATES)],
        env=environment, cwd=ROOT, check=True, capture_output=True, timeout=LIMIT,
    )
    ours, unbroken = (
        torch.load(path / "checkpoint_last.pt", weights_only=False)["model"]
        for path in (folder / "checkpoints", tmp_path)
    )
    assert ours.keys() == unbroken.keys()
    for name, value in ours.items():
        assert torch.equal(value, unbroken[name]), name


def test_a_finished_run_is_reported_not_retrained(resumed, quickstart):
    folder, _, first = resumed
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    again = quickstart(folder)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "nothing is retrained" in again.stdout
    assert "$" not in again.stdout  # no command
    table = first.stdout[first.stdout.index("From dense to sparse"):]
    assert again.stdout.endswith(table)
    before.pop(folder / ".lock")
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_failed_step_shows_the_end_of_its_log(quickstart, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    run = quickstart(tmp_path / "run", "--text", str(empty))
    assert run.returncode == 1
    assert f"error: --{empty}" not in run.stderr
    log = tmp_path / "run/prepare.log"
    assert run.stderr.endswith(f"error: evomoe failed (status 2); its whole log is {log}\n")
    assert log.read_text().splitlines()[-1] in run.stderr


@pytest.fixture
def modules(monkeypatch):
    """The quickstart's own modules, by name."""
    monkeypatch.syspath_prepend(RUN.parent)
    names = ("commands", "recipe", "folder")
    yield [importlib.import_module(name) for name in names]
    for name in names:
        del sys.modules[name]


@pytest.fixture
def made(modules, tmp_path):
    """A folder that belongs to a run, and the recipe of that."""
    _, recipe, folder = modules
    owned, made_with = folder.RunFolder(tmp_path / "run"), recipe.Recipe(updates=100)
    with owned.locked():
        owned.claim(made_with)
    return owned, made_with


def test_the_same_recipe_goes_on(made):
    folder, recipe = made
    with folder.locked():
        folder.claim(recipe)


@pytest.mark.parametrize(("change", "told"), [
    ({"updates": 50}, "--updates 100, now 50"),
    ({"quick": True}, "--quick not given, now given"),
    ({"text": ("/some/text",)}, "--text the Python standard library, now /some/text"),
])
def test_another_recipe_is_refused(modules, made, change, told):
    commands, recipe, _ = modules
    folder, _ = made
    with folder.locked(), pytest.raises(commands.Refused) as refused:
        folder.claim(recipe.Recipe(**{"updates": 100, **change}))
    assert told in str(refused.value) and "--fresh" in str(refused.value)


def test_options_that_the_clone_changed_are_named(modules, made, monkeypatch):
    commands, recipe, _ = modules
    folder, recipe_before = made
    train = [(n, "0.5" if n == "--lr" else v) for n, v in recipe_before.train]
    monkeypatch.setattr(recipe.Recipe, "train", train)
    with folder.locked(), pytest.raises(commands.Refused, match=r"--lr 0\.003, now 0\.5"):
        folder.claim(recipe_before)


def test_a_changed_text_is_refused(modules, tmp_path, environment):
    commands, recipe, folder = modules
    text = tmp_path / "text"
    shutil.copytree(TEXT, text, ignore=shutil.ignore_patterns("__pycache__"))
    made_with = recipe.Recipe(updates=100, quick=True, text=(str(text),))
    owned = folder.RunFolder(tmp_path / "run")
    with owned.locked():
        owned.claim(made_with)
        subprocess.run(
            [shutil.which("evomoe", path=environment["PATH"]), "prepare", str(text), "--out",
             str(owned.data), *recipe.flags(made_with.prepare)],
            env=environment, check=True, capture_output=True, timeout=LIMIT,
        )
        owned.claim(made_with)
        with open(text / "utils.py", "a") as file:
            file.write("# more\n")
        with pytest.raises(commands.Refused, match=r"text/utils\.py has changed.*--fresh"):
            owned.claim(made_with)


def test_a_folder_of_others_is_left_alone(modules, tmp_path):
    commands, _, folder = modules
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(commands.Refused, match="name another folder"):
        with folder.RunFolder(tmp_path).locked():
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_starting_anew_deletes_only_what_is_ours(made):
    folder, _ = made
    (folder.path / "notes.txt").write_text("mine")
    folder.checkpoints.mkdir()
    folder.last.write_text("old")
    with folder.locked():
        folder.clear()
    assert {path.name for path in folder.path.iterdir()} == {"notes.txt", ".lock"}


def test_two_quickstarts_do_not_share_a_folder(modules, made):
    commands, _, folder = modules
    owned, _ = made
    with owned.locked(), pytest.raises(commands.Refused, match="another quickstart is at work"):
        with folder.RunFolder(owned.path).locked():
            pass


def test_a_damaged_checkpoint_is_refused(modules, made):
    commands, _, _ = modules
    folder, _ = made
    assert folder.trained_updates() == 0
    folder.checkpoints.mkdir()
    folder.last.write_bytes(b"PK half a file")
    with pytest.raises(commands.Refused, match="checkpoint_last.pt cannot be read.*--fresh"):
        folder.trained_updates()


def test_shown_commands_are_what_runs(modules, tmp_path, capfd):
    """A shell that is given what is printed calls the program with the same words."""
    commands, _, _ = modules
    words = ["--betas", "(0.9, 0.98)", "--flag", "--path", "a b", *["--longer", "x" * 60] * 3]
    script = tmp_path / "words.py"
    script.write_text("import sys; print(sys.argv[1:])")
    commands.run([sys.executable, str(script), *words], tmp_path / "log")
    printed = capfd.readouterr().out
    assert max(map(len, printed.splitlines())) <= commands.LINE
    shell = subprocess.run(printed.replace("$", "", 1), shell=True, capture_output=True, text=True)
    assert shell.stdout == (tmp_path / "log").read_text() == f"{words}\n"
