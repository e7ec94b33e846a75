"""One line for a configuration that Hydra cannot compose, for values in it that refer to what is
not there, and for folders that Hydra cannot write."""

from __future__ import annotations

import builtins
import copy
import errno
import os
import re

import pytest
from fairseq.dataclass.initialize import hydra_init
from hydra import compose, initialize_config_dir
from hydra._internal import config_repository
from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError

import evomoe_plugin  # noqa: F401  registers what the files name
from evomoe_plugin.launch import hydra_errors
from evomoe_plugin.launch.interpolations import unresolved
from tests.conftest import ROOT

RUN = "small/evomoe_dts"
CASES = {
    "a key": (RUN, "model.moe_gatee=top_k", r"model\.moe_gatee: .* did you mean moe_gate\?$"),
    "a key unlike any": (RUN, "model.xyzzy=1", r"model\.xyzzy: Key 'xyzzy' [^;]*$"),
    "a value": (RUN, "optimization.lr=0.1", r"optimization\.lr: .* float is not a ListConfig"),
    "a number": (RUN, "optimization.max_update=x", r"optimization\.max_update: Value 'x' .* Int"),
    "a choice": (RUN, "optimizer=adan", r"optimizer/adan: .* did you mean adam\?; one of: .*, nag"),
    "a file": (
        RUN,
        "+gate=switsh",
        r"small/gate/switsh: .* did you mean switch\?; one of: base_layers",
    ),
    "the run": ("small/evomoedts", "", r"small/evomoedts: .* did you mean evomoe_dts\?; one of"),
    "syntax": (
        RUN,
        "model.moe_gate=[",
        r"model\.moe_gate=\[: no viable alternative at .*'\['$",
    ),
}


@pytest.fixture(autouse=True)
def explained(monkeypatch):
    for owner, name, _ in hydra_errors.WRAPPED:
        monkeypatch.setattr(owner, name, getattr(owner, name))  # put back at the end
    hydra_errors.explain()


@pytest.fixture(autouse=True)
def hydra_as_users_have_it(monkeypatch):
    """Without what `remember_parsing` has done for all tests."""
    monkeypatch.setattr(config_repository, "copy", copy)
    monkeypatch.setattr(OverridesParser, "parse_rule", OverridesParser.parse_rule.__wrapped__)


def composed(folder, run, *overrides):
    """What cannot be composed: the message."""
    hydra_init()
    GlobalHydra.instance().clear()
    with (
        initialize_config_dir(str(folder), version_base="1.1"),
        pytest.raises(ConfigCompositionException) as error,
    ):
        compose(run, list(overrides))
    return str(error.value)


@pytest.mark.filterwarnings(r"ignore:\s*version_base")
@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_composed_is_one_line(case):
    run, override, message = CASES[case]
    line = composed(ROOT / "hydra_configs", run, *([override] if override else []))
    assert re.match(message, line) and "\n" not in line, line


@pytest.mark.filterwarnings(r"ignore:\s*version_base")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [", "while parsing a flow node expected the node content"),
        (b"a: \xff", "'utf-8' codec can't decode byte 0xff in position 3: invalid start byte"),
        (None, "Permission denied"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch, content, message):
    file = tmp_path / "run.yaml"
    file.write_bytes(content or b"")
    if content is None:
        refuse(monkeypatch, file, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
    line = composed(tmp_path, "run")
    assert line.startswith(f"{file}: cannot be read: {message}") and "\n" not in line, line


def refuse(monkeypatch, path, error):
    """Opening `path` raises `error`, whoever opens it."""
    original = builtins.open

    def refusing(file, *args, **kwargs):
        if str(file) == str(path):
            raise error
        return original(file, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", refusing)


@pytest.mark.parametrize(
    ("value", "remedy"),
    [
        (
            "${oc.env:MISSING}",
            "the environment variable MISSING is not set; set it, or give a default: "
            "${oc.env:MISSING,DEFAULT}",
        ),
        ("${b.nam}", r"there is no b.nam; did you mean name\?"),
        ("${xyzzy}", "there is no xyzzy"),
        ("${..bb}", "there is no bb"),  # not "did you mean b": that is of the root
        ("${a.b}", "it refers to itself, maybe by way of others; give one of them a value"),
        ("${b.none}", "MissingMandatoryValue while resolving interpolation: .* b.none"),
        ("${nonsense:1}", "Unsupported interpolation type nonsense; give a key, or a resolver .*"),
        ("${oc.env:}", "TypeError raised while resolving interpolation: .* argument: 'key'"),
    ],
)
@pytest.mark.parametrize("is_listed", [False, True])
def test_a_value_that_refers_to_what_is_not_there(value, remedy, is_listed):
    setup_globals()  # as every command of Hydra
    b = {"name": 1, "none": "???"}
    cfg = OmegaConf.create({"a": {"b": [value] if is_listed else value}, "b": b})
    if value == "${a.b}" and is_listed:
        cfg.a.b = ["${a.b[0]}"]
    with pytest.raises(InterpolationResolutionError) as raised:
        OmegaConf.to_container(cfg, resolve=True)
    line = unresolved(raised.value)
    given = cfg.a._get_node("b")
    given = given._get_node(0)._value() if is_listed else given._value()
    wanted = re.escape(f"a.b{'[0]' * is_listed} {given}: ")
    assert re.fullmatch(wanted + remedy.replace("$", "\\$").replace("{", "\\{"), line), line


@pytest.mark.parametrize("content", [{1: {"b": "${c}"}}, {"a.b": "${c}"}, {True: "${c}"}])
def test_any_key_is_named(content):
    with pytest.raises(InterpolationResolutionError) as raised:
        OmegaConf.to_container(OmegaConf.create(content), resolve=True)
    line = unresolved(raised.value)
    assert line == f"{raised.value.full_key} ${{c}}: there is no c"


def test_an_error_without_a_container_is_joined():
    assert unresolved(InterpolationResolutionError("not\n\there")) == "not here"


def test_a_resolver_of_the_user_keeps_its_traceback():
    OmegaConf.register_new_resolver("mine", lambda _: OmegaConf.create("{"), replace=True)
    try:
        with pytest.raises(InterpolationResolutionError) as raised:
            OmegaConf.to_container(OmegaConf.create({"a": "${mine:x}"}), resolve=True)
    finally:
        OmegaConf.clear_resolver("mine")
    assert unresolved(raised.value) is None


def hydra_train(runs, *arguments):
    """As the command would, but for its log."""
    names = [f"hydra/{name}_logging=none" for name in ("job", "hydra")]
    at = "--config-dir", ROOT / "hydra_configs", "--config-name", "small/evomoe_dts"
    return runs.run("hydra_train", *at, f"task.data={runs.data}", *names, *arguments)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["checkpoint.save_dir=${oc.env:MISSING}", "hydra.run.dir={folder}"],
            "checkpoint.save_dir ${oc.env:MISSING}: the environment variable MISSING is not set; ",
        ),
        (
            ["hydra.mode=MULTIRUN", "common.seed=${model.nothing}", "hydra.sweep.dir={folder}"],
            "common.seed ${model.nothing}: there is no model.nothing",
        ),
        (["hydra.run.dir=${oc.env:MISSING}"], "hydra.run.dir ${oc.env:MISSING}: the environment "),
        (["hydra.run.dir={file}"], "hydra.run.dir {file}: cannot write {file}: File exists; give"),
        (
            ["hydra.run.dir={file}/${hydra:mode}"],
            "hydra.run.dir {file}/RunMode.RUN: cannot write {file}/RunMode.RUN: Not a directory; ",
        ),
        (
            ["hydra.run.dir={folder}", "hydra.output_subdir=a", "hydra.job.chdir=true"],
            "hydra.run.dir {folder}: cannot write {folder}/a/config.yaml: No space left on device",
        ),
        (
            ["hydra.mode=MULTIRUN", "hydra.sweep.dir={file}", "common.seed=1,2"],
            "hydra.sweep.dir {file}: cannot write {file}: File exists; give a folder that can be",
        ),
        (["--config-dir", "{file}"], "--config-dir {file}: there is no such folder"),
        (["model.moe_gatee=top_k"], "model.moe_gatee: Key 'moe_gatee' not in "),
    ],
)
def test_a_command_ends_in_one_line(runs, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MISSING", raising=False)
    paths = {"file": tmp_path / "file", "folder": tmp_path / "folder"}
    paths["file"].write_text("")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(paths["folder"] / "a/config.yaml"))
    refuse(monkeypatch, full.filename, full)
    for name, path in paths.items():
        arguments = [argument.replace(f"{{{name}}}", str(path)) for argument in arguments]
        message = message.replace(f"{{{name}}}", str(path))
    assert hydra_train(runs, *arguments) == 2
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 1 and printed[0].startswith(f"error: {message}"), printed


@pytest.mark.filterwarnings("ignore")
def test_a_log_that_cannot_be_written(runs, tmp_path, monkeypatch, capsys):
    def configure_log(*_):
        cause = OSError(errno.EROFS, os.strerror(errno.EROFS), str(tmp_path / "log"))
        raise ValueError("Unable to configure handler 'file'") from cause

    monkeypatch.setattr("hydra.core.utils.configure_log", configure_log)
    assert hydra_train(runs, f"hydra.run.dir={tmp_path}") == 2
    line = f"error: hydra.run.dir {tmp_path}: cannot write {tmp_path}/log: Read-only file system; "
    assert capsys.readouterr().err.startswith(line)


class OwnSweeper(BasicSweeper):
    """One that reads a file of its own."""

    def sweep(self, arguments):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), "/own")


class OwnLauncher(BasicLauncher):
    """One whose job fails elsewhere, and comes back without its traceback."""

    def launch(self, job_overrides, initial_job_idx):
        job = JobReturn(status=JobStatus.FAILED)
        job.return_value = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return [job]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("own", [OwnSweeper, OwnLauncher])
def test_errors_of_other_files_keep_their_traceback(runs, tmp_path, capsys, own):
    plugin = own.__name__.removeprefix("Own").lower()
    target = f"hydra.{plugin}._target_={own.__module__}.{own.__name__}"
    folder = f"hydra.sweep.dir={tmp_path}"
    assert hydra_train(runs, "hydra.mode=MULTIRUN", target, folder, "common.seed=1,2") == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_an_error_of_a_program_while_composing_keeps_its_traceback(runs, monkeypatch, capsys):
    def load(*_, **__):
        raise ValueError("of a plugin")

    monkeypatch.setattr(
        "hydra._internal.config_loader_impl.ConfigLoaderImpl._load_configuration_impl", load
    )
    assert hydra_train(runs) == 1
    assert "ValueError: of a plugin" in capsys.readouterr().err


def test_a_folder_whose_disk_is_full_while_it_is_written(runs, tmp_path, monkeypatch, capsys):
    def to_yaml(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("hydra.core.utils.OmegaConf.to_yaml", to_yaml)
    assert hydra_train(runs, f"hydra.run.dir={tmp_path}") == 2
    line = f"error: hydra.run.dir {tmp_path}: cannot write {tmp_path}: No space left on device; "
    assert capsys.readouterr().err.startswith(line)


@pytest.mark.filterwarnings("ignore")
def test_tracebacks_on_request(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(InterpolationResolutionError):
        hydra_train(runs, f"hydra.run.dir={tmp_path}", "common.seed=${oc.env:MISSING}")
