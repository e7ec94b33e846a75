"""`evomoe doctor`, and through it what the `evomoe` command does with any verb."""

import json
import os
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import evomoe_plugin
from evomoe_plugin import patches
from evomoe_plugin.cli import VERBS, doctor, main
from evomoe_plugin.config.errors import OptionError

ROOT = Path(evomoe_plugin.__file__).parents[1]
EVOMOE = [sys.executable, "-c", "import sys; from evomoe_plugin.cli import main; sys.exit(main())"]


def diagnosed(capsys):
    """Exit status of `evomoe doctor --json`, and its rows by name."""
    status = main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["training_works"] == (status == 0)
    return status, {row["name"]: row for row in report["rows"]}


def test_sound_environment(capsys):
    status, rows = diagnosed(capsys)
    assert status == 0
    assert rows["torch"]["found"] == metadata.version("torch")
    assert rows["fairseq"]["state"] == "ok"
    assert rows["gloo"]["found"] == "yes"
    assert rows["transformers"]["remark"] == "its models can be imported"
    statuses = {status.name: status for status in patches.report()}
    assert statuses.keys() <= rows.keys()
    for name, status in statuses.items():
        assert (rows[name]["found"] == "active", rows[name]["remark"]) == (
            status.active,
            status.reason,
        )


def test_fairseq_that_cannot_be_imported(capsys, monkeypatch):
    error = ValueError("mutable default <class 'CommonConfig'> for field common\nsecond line")
    monkeypatch.setattr(evomoe_plugin, "fairseq_error", error)
    monkeypatch.setattr(doctor, "version_of", {"fairseq": "0.12.2"}.get)
    monkeypatch.setattr(doctor, "requirements", lambda: {"ve-fairseq": "==0.12.3"})
    status, rows = diagnosed(capsys)
    assert status == 1
    row = rows["fairseq"]
    assert (row["found"], row["state"]) == ("fairseq 0.12.2", "STOP")
    assert "mutable default" in row["remark"] and "second line" not in row["remark"]
    assert "pip uninstall -y fairseq; pip install" in row["remark"]
    assert "'ve-fairseq==0.12.3'" in row["remark"]
    assert rows["all"]["found"] == "not applied"


def test_fairseq_that_lacks_another_package_is_not_reinstalled(monkeypatch):
    error = ModuleNotFoundError("No module named 'regex'", name="regex")
    monkeypatch.setattr(evomoe_plugin, "fairseq_error", error)
    monkeypatch.setattr(doctor, "version_of", {"ve-fairseq": "0.12.3"}.get)
    remark = doctor.fairseq_row({"ve-fairseq": "==0.12.3"}).remark
    assert "'regex'" in remark and "make venv" in remark and "pip install" not in remark


def test_two_distributions_of_fairseq(monkeypatch):
    monkeypatch.setattr(
        doctor, "version_of", {"ve-fairseq": "0.12.3", "fairseq-fixed": "0.12.3.1"}.get
    )
    row = doctor.fairseq_row({"fairseq-fixed": "==0.12.3.1"})
    assert row.state == "fix"
    assert row.found == "ve-fairseq 0.12.3, fairseq-fixed 0.12.3.1"
    assert "pip uninstall -y ve-fairseq; " in row.remark


@pytest.mark.parametrize(
    ("name", "version", "specifier", "state", "remark"),
    [
        ("torch", "2.12.1", ">=2.13", "STOP", "pip install 'torch>=2.13'"),
        ("torch", "2.13.0+cpu", ">=2.13", "ok", ""),
        ("hydra-core", "1.4.0", "<1.4,>=1.3.2", "STOP", "pip install 'hydra-core<1.4,>=1.3.2'"),
        ("fairscale", None, ">=0.4.13", "STOP", "pip install 'fairscale>=0.4.13'"),
        ("pyarrow", None, "", "fix", "pip install 'pyarrow'"),
    ],
)
def test_versions(capsys, monkeypatch, name, version, specifier, state, remark):
    real = doctor.version_of
    monkeypatch.setattr(doctor, "version_of", lambda n: version if n == name else real(n))
    monkeypatch.setattr(doctor, "requirements", lambda: {name: specifier})
    status, rows = diagnosed(capsys)
    assert (rows[name]["state"], rows[name]["remark"]) == (state, remark)
    assert status == (state == "STOP")


def test_package_that_is_installed_but_broken(monkeypatch):
    monkeypatch.setattr(doctor, "version_of", {"wreck": "1.0+cpu"}.get)
    row = doctor.package_row("wreck", "wreck_module", "", "STOP")
    assert row.state == "STOP"
    assert "No module named 'wreck_module'" in row.remark
    assert "pip install --force-reinstall 'wreck==1.0'" in row.remark


@pytest.mark.parametrize(
    ("message", "fix"),
    [
        (
            "Could not load this library: torchaudio/lib/_torchaudio.abi3.so",
            "pip uninstall -y torcha",
        ),
        ("cannot import name 'GPT2LMHeadModel'", "pip install --force-reinstall transformers"),
    ],
)
def test_transformers_whose_models_cannot_be_imported(monkeypatch, message, fix):
    class Broken:
        def __getattr__(self, name):
            raise OSError(message)

    monkeypatch.setattr(doctor, "version_of", {"transformers": "5.0"}.get)
    monkeypatch.setitem(sys.modules, "transformers", Broken())
    row = doctor.transformers_row()
    assert (row.found, row.state) == ("5.0", "fix")
    assert message in row.remark and fix in row.remark


def test_transformers_is_optional(monkeypatch):
    monkeypatch.setattr(doctor, "version_of", {}.get)
    row = doctor.transformers_row()
    assert (row.found, row.state) == ("missing", "off")


@pytest.fixture
def fake_apex(tmp_path, monkeypatch):
    """A package `apex` with the given subpackage, first on the path. Importing it is an error."""

    def make(subpackage):
        folder = tmp_path / "apex"
        (folder / subpackage).mkdir(parents=True)
        (folder / "__init__.py").write_text("raise RuntimeError('imported')")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "apex", raising=False)
        return folder

    return make


def test_unrelated_apex_is_named(capsys, fake_apex):
    folder = fake_apex("scaffolds")
    status, rows = diagnosed(capsys)
    assert status == 0  # training works without any
    assert (rows["apex"]["found"], rows["apex"]["state"]) == (str(folder), "fix")
    assert "pip uninstall apex" in rows["apex"]["remark"]


def test_nvidias_apex_is_known(capsys, fake_apex):
    folder = fake_apex("optimizers")
    _, rows = diagnosed(capsys)
    assert (rows["apex"]["state"], rows["apex"]["remark"]) == ("ok", str(folder))


def test_table_shows_every_row_as_it_is(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    rows = [
        doctor.Row("versions", "torch", "2.13.0", "ok", "[bold]"),
        doctor.Row("devices", "GPU", "none", "off", "on [the] CPU"),
    ]
    lines = [line.split() for line in doctor.as_table(rows).splitlines() if line.strip()]
    assert lines[1:] == [
        ["versions"],
        ["torch", "2.13.0", "ok", "[bold]"],
        ["devices"],
        ["GPU", "none", "off", "on", "[the]", "CPU"],
    ]


def test_table_closes_with_what_stands_in_the_way(capsys, monkeypatch):
    monkeypatch.setattr(
        doctor,
        "diagnosis",
        lambda: [
            doctor.Row("versions", "torch", "missing", "STOP"),
            doctor.Row("fast paths", "apex", "here", "fix"),
            doctor.Row("versions", "numpy", "2"),
        ],
    )
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "Training cannot work here until this is fixed: torch.",
        "Fix recommended: apex.",
    ]


# The command


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (
            OptionError("vocab_size", 3, "give 8 or more"),
            2,
            "error: --vocab-size 3: give 8 or more\n",
        ),
        (
            OSError(28, "No space left on device", "train.bin"),
            1,
            "error: [Errno 28] No space left on device: 'train.bin'\n",
        ),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_errors_of_users_and_machines_take_one_line(capsys, monkeypatch, error, status, message):
    def run(args):
        raise error

    monkeypatch.setattr(doctor, "run", run)
    assert main(["doctor"]) == status
    assert capsys.readouterr().err == message


def test_errors_of_ours_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(doctor, "run", lambda args: {}["nothing"])
    with pytest.raises(KeyError):
        main(["doctor"])


def test_verbs_that_need_fairseq_send_to_the_doctor(capsys, monkeypatch):
    monkeypatch.setattr(evomoe_plugin, "fairseq_error", ImportError("no fairseq"))
    monkeypatch.setattr("evomoe_plugin.cli.prepare.run", lambda args: 1 / 0)
    assert main(["prepare", "text", "--out", "folder"]) == 1
    assert capsys.readouterr().err == (
        "error: fairseq cannot be imported (no fairseq); run `evomoe doctor` for the fix\n"
    )


def test_help_version_and_typos(capsys):
    assert main([]) == 2
    usage = capsys.readouterr().err
    assert VERBS["doctor"] in " ".join(usage.split())
    for argv, status, printed in (
        (["--version"], 0, f"evomoe_plugin {evomoe_plugin.__version__}"),
        (["--help"], 0, "prepare"),
        (["doctor", "--help"], 0, "Exit status"),
        (["docter"], 2, "invalid choice: 'docter'"),
    ):
        with pytest.raises(SystemExit) as exit:
            main(argv)
        assert exit.value.code == status
        assert printed in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--version"],
        ["--help"],
        *([verb, "--help"] for verb in VERBS if verb != "upcycle"),
    ],
    ids=" ".join,
)
def test_help_imports_neither_torch_nor_fairseq(arguments):
    """`upcycle --help` lists the options of every gate, as fairseq-train does."""
    program = f"""if True:
        import contextlib, sys
        from evomoe_plugin.cli import main
        with contextlib.suppress(SystemExit):
            main({arguments})
        sys.exit(", ".join(sys.modules.keys() & {{"torch", "fairseq", "transformers"}}) or 0)
    """
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stderr.strip()) == (0, "")
    assert "evomoe" in done.stdout


def test_closed_pipe_is_no_error(monkeypatch, capfd):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main(["doctor"]) == 128 + signal.SIGPIPE
    assert capfd.readouterr().err == ""
