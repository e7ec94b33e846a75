"""The quickstart: interrupted, resumed, run again, rejected."""

from __future__ import annotations

import contextlib
import email
import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from evomoe_plugin.data import PrepareOptions, prepare
from evomoe_plugin.metrics import read_log
from tests.end_to_end.forks import Forked

ROOT = Path(__file__).parents[1]
RUN = ROOT / "examples/quickstart/run.py"
UPDATES = 40
TEXT = Path(email.__file__).parent  # more than the run sees once


def arguments(folder: Path, text: Path = TEXT) -> list[str]:
    return ["--quick", "--updates", str(UPDATES), "--text", str(text), "--dir", str(folder)]


@pytest.fixture(scope="module", autouse=True)
def environment(tmp_path_factory):
    """The clone's own commands, even if the package is not installed."""
    folder = tmp_path_factory.mktemp("bin")
    evomoe = folder / "evomoe"
    evomoe.write_text(
        f"#!{sys.executable}\nimport sys\nfrom evomoe_plugin.cli import main\nsys.exit(main())\n"
    )
    evomoe.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(folder), prepend=os.pathsep)
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def modules(environment):
    """The quickstart's modules, by name."""
    names = ("commands", "recipe", "folder", "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(RUN.parent)
        for name in names:
            patch.delitem(sys.modules, name, raising=False)
        yield types.SimpleNamespace(**{name: importlib.import_module(name) for name in names})


class Popen(subprocess.Popen):
    """The quickstart's commands; those of fairseq are forked, not started."""

    def __new__(cls, command, **given):
        name = Path(command[0]).name
        if not name.startswith("fairseq-"):
            return super().__new__(cls)
        assert given["stderr"] == subprocess.STDOUT and given["start_new_session"]
        return Forked(
            name.removeprefix("fairseq-").replace("-", "_"),
            command[1:],
            given["cwd"],
            given["env"],
            Path(given["stdout"].name),
        )


@pytest.fixture(scope="module")
def quickstart(modules):
    """Run the quickstart here; returns exit status, stdout and stderr. It writes to what is
    `given` for stdout."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}

    def run(*argv: str, given: io.StringIO | None = None) -> tuple[int, str, str]:
        out, err = given or io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = modules.run.main(list(argv))
        return status, out.getvalue(), err.getvalue()

    with pytest.MonkeyPatch.context() as patch:
        names = {**vars(subprocess), "Popen": Popen}
        patch.setattr(modules.commands, "subprocess", types.SimpleNamespace(**names))
        yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def is_interrupted_at(line: str) -> bool:
    """Annealing has started, and there is a checkpoint."""
    return line.split()[:1] == ["20"]


class CtrlC(io.StringIO):
    """Interrupts who writes the line."""

    def write(self, text: str) -> int:
        count = super().write(text)
        if is_interrupted_at(text):
            signal.raise_signal(signal.SIGINT)
        return count


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, quickstart) -> tuple[Path, int, str]:
    """Folder, exit status and output of a run interrupted by Ctrl-C during training."""
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    status, out, err = quickstart(*arguments(folder), given=CtrlC())
    return folder, status, out + err


@pytest.fixture(scope="module")
def interrupted_process(tmp_path_factory, environment) -> tuple[Path, int, str]:
    """As `interrupted`, all in processes of their own."""
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    process = subprocess.Popen(
        [sys.executable, str(RUN), *arguments(folder)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    output = ""
    for line in process.stdout:
        output += line
        if is_interrupted_at(line):
            process.send_signal(signal.SIGINT)
    return folder, process.wait(), output


@pytest.fixture(scope="module")
def resumed(interrupted, quickstart) -> tuple[Path, int, str]:
    """Folder, resumed update, and output of the finished run."""
    folder, _, output = interrupted
    update = saved_updates(folder)
    status, out, err = quickstart(*arguments(folder))
    assert status == 0, output + out + err
    return folder, update, out


def saved_updates(folder: Path) -> int:
    state = torch.load(folder / "checkpoints/checkpoint_last.pt", weights_only=False)
    return state["optimizer_history"][-1]["num_updates"]


@pytest.mark.parametrize(
    "how", ["interrupted", pytest.param("interrupted_process", marks=pytest.mark.slow)]
)
def test_ctrl_c_says_that_the_run_can_go_on(request, how):
    folder, status, output = request.getfixturevalue(how)
    assert status == 130, output
    assert output.endswith("interrupted: run it again to continue\n")
    assert "Traceback" not in output
    assert read_log(folder / "train.log").intervals[-1].update < UPDATES


def test_run_again_it_goes_on(resumed):
    folder, update, out = resumed
    assert 0 < update < UPDATES
    assert f"interrupted after {update} of {UPDATES} updates: resuming" in out
    log = read_log(folder / "train.log")
    assert [record.update for record in log.intervals] == list(range(1, UPDATES + 1))
    assert log.intervals[0].values["experts_per_token"] > 7.9
    assert log.intervals[-1].values["experts_per_token"] == 1.0
    assert saved_updates(folder) == UPDATES
    assert (folder / "run.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_reports_the_measurements(resumed):
    folder, _, out = resumed
    rows = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines()]
    cells = {row[0]: row[1:] for row in rows}
    before, after = (float(cell.replace(",", "")) for cell in cells["test perplexity"])
    for perplexity, log in [(before, "eval-first.log"), (after, "eval-last.log")]:
        found = re.findall(r"Perplexity: ([\d.]+)", (folder / log).read_text())
        assert [perplexity] == [pytest.approx(float(number), abs=0.06) for number in found]
    assert before > 1.5 * after > 1.5
    assert cells["experts per token"][1] == "1.00"
    assert "time per update (median)" in cells


def test_a_finished_run_is_reported_not_retrained(resumed, quickstart):
    folder, _, first = resumed
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    before.pop(folder / ".lock")
    status, out, err = quickstart(*arguments(folder))
    assert status == 0, out + err
    assert "nothing is retrained" in out
    assert "$" not in out  # no command
    assert out.endswith(first[first.index("From dense to sparse") :])
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.slow
def test_the_interruption_changed_nothing(resumed, tmp_path):
    """One command that trains all updates gives the same weights."""
    folder, _, _ = resumed
    options = json.loads((folder / "settings.json").read_text())["train"]
    words = [word for option in options for word in option if word is not None]
    subprocess.run(
        [
            sys.executable,
            "-m",
            "fairseq_cli.train",
            str(folder / "data"),
            *words,
            "--save-dir",
            str(tmp_path),
            "--max-update",
            str(UPDATES),
        ],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    ours, unbroken = (
        torch.load(path / "checkpoint_last.pt", weights_only=False)["model"]
        for path in (folder / "checkpoints", tmp_path)
    )
    assert ours.keys() == unbroken.keys()
    for name, value in ours.items():
        assert torch.equal(value, unbroken[name]), name


def test_a_failed_step_shows_the_end_of_its_log(modules, quickstart, tmp_path, monkeypatch):
    failing = tmp_path / "evomoe"
    failing.write_text("#!/bin/sh\nseq 30\necho 'error: the disk is full' >&2\nexit 3\n")
    failing.chmod(0o755)
    monkeypatch.setattr(modules.run, "program", lambda name: str(failing))
    status, _, err = quickstart(*arguments(tmp_path / "run"))
    assert status == 1
    shown = [str(number) for number in range(17, 31)]
    log = tmp_path / "run/prepare.log"
    assert err.splitlines() == [
        *shown,
        "error: the disk is full",
        "",
        f"error: evomoe failed (status 3); its full log is {log}",
    ]


def test_a_refusal_is_one_line(environment, tmp_path):
    """In a process of its own, as users start it."""
    (tmp_path / "thesis.tex").write_text("years of work")
    done = subprocess.run(
        [sys.executable, str(RUN), *arguments(tmp_path)], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (
        2,
        "",
        f"error: --dir {tmp_path} has files that are not of a quickstart; give another folder\n",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.fixture
def made(modules, tmp_path):
    """A folder of a run, and its recipe."""
    folder = modules.folder.RunFolder(tmp_path / "run")
    recipe = modules.recipe.Recipe(updates=100)
    with folder.locked():
        folder.claim(recipe)
    return folder, recipe


def test_the_same_recipe_goes_on(made):
    folder, recipe = made
    with folder.locked():
        folder.claim(recipe)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"updates": 50}, "--updates 100, now 50"),
        ({"quick": True}, "--quick not given, now given"),
        ({"text": ("/some/text",)}, "--text the Python standard library, now /some/text"),
    ],
)
def test_another_recipe_is_rejected(modules, made, change, difference):
    folder, _ = made
    with folder.locked(), pytest.raises(modules.commands.Refused) as refused:
        folder.claim(modules.recipe.Recipe(**{"updates": 100, **change}))
    assert difference in str(refused.value) and "--fresh" in str(refused.value)


def test_options_that_the_clone_changed_are_named(modules, made, monkeypatch):
    folder, recipe = made
    train = [(name, "0.5" if name == "--lr" else value) for name, value in recipe.train]
    monkeypatch.setattr(modules.recipe.Recipe, "train", train)
    with folder.locked(), pytest.raises(modules.commands.Refused, match=r"--lr \S+, now 0\.5"):
        folder.claim(recipe)


def test_a_changed_text_is_refused(modules, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for number in range(9):
        (text / f"{number}.txt").write_text(f"Document {number}: {TEXT.stem * 40}")
    recipe = modules.recipe.Recipe(updates=100, quick=True, text=(str(text),))
    folder = modules.folder.RunFolder(tmp_path / "run")
    with folder.locked():
        folder.claim(recipe)
        prepare(
            PrepareOptions(
                (str(text),), str(folder.data), text_suffix=(".py",), vocab_size=300, workers=1
            )
        )
        folder.claim(recipe)
        (text / "3.txt").write_text("another one")
        with pytest.raises(modules.commands.Refused, match=r"text/3\.txt has changed.*--fresh"):
            folder.claim(recipe)


def test_starting_anew_deletes_only_what_is_ours(made):
    folder, _ = made
    (folder.path / "notes.txt").write_text("mine")
    folder.checkpoints.mkdir()
    folder.last.write_text("old")
    with folder.locked():
        folder.clear()
    assert {path.name for path in folder.path.iterdir()} == {"notes.txt", ".lock"}


def test_two_quickstarts_do_not_share_a_folder(modules, made):
    folder, _ = made
    with folder.locked(), pytest.raises(modules.commands.Refused, match="another quickstart"):
        with modules.folder.RunFolder(folder.path).locked():
            pass


def test_a_damaged_checkpoint_is_refused(modules, made):
    folder, _ = made
    assert folder.trained_updates() == 0
    folder.checkpoints.mkdir()
    folder.last.write_bytes(b"PK half a file")
    with pytest.raises(modules.commands.Refused, match="last.pt cannot be read.*--fresh"):
        folder.trained_updates()


def test_shown_commands_are_what_runs(modules, tmp_path, capfd):
    """A shell that runs the printed command calls the program with the same words."""
    words = ["--betas", "(0.9, 0.98)", "--flag", "--path", "a b", *["--longer", "x" * 60] * 3]
    script = tmp_path / "words.py"
    script.write_text("import sys; print(sys.argv[1:])")
    modules.commands.run([sys.executable, str(script), *words], tmp_path / "log")
    printed = capfd.readouterr().out
    # The first line has the two paths only, whatever their length.
    assert max(map(len, printed.splitlines()[2:])) <= modules.commands.LINE
    shell = subprocess.run(printed.replace("$", "", 1), shell=True, capture_output=True, text=True)
    assert shell.stdout == (tmp_path / "log").read_text() == f"{words}\n"
