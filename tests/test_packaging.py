"""What is installed: the wheel and the lock; and what `make` refuses."""

import email
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import evomoe_plugin

ROOT = Path(__file__).parents[1]
IN_LOCK = ("benchmarks", "docs", "fairseq", "lint", "plots", "tensorboard", "tests")
PLUGIN = "evomoe_plugin/launch/hydra_plugins/"


def run(*command, **options):
    return subprocess.run(command, text=True, capture_output=True, timeout=300, **options)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this checkout, built in a copy: building leaves files behind."""
    folder = tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("evomoe_plugin", "hydra_configs"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, folder / "source" / name)
    built = run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        folder,
        folder / "source",
    )
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


@pytest.fixture(scope="module")
def requirements(wheel_metadata):
    return [Requirement(text) for text in wheel_metadata.get_all("Requires-Dist")]


# The wheel


def test_wheel_holds_every_module_and_configuration_and_nothing_else(wheel):
    expected = (
        {
            path.relative_to(ROOT).as_posix().replace(PLUGIN, "hydra_plugins/")
            for path in (ROOT / "evomoe_plugin").rglob("*.py")
        }
        | {
            f"evomoe_plugin/{path.relative_to(ROOT).as_posix()}"
            for path in (ROOT / "hydra_configs").rglob("*.yaml")
        }
        | {"evomoe_plugin/py.typed", "evomoe_plugin/report/page.html.j2"}
        | {"evomoe_quiet_imports/__init__.py"}
    )
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == expected
    assert "evomoe_plugin/hydra_configs/small/evomoe_dts.yaml" in held
    assert "hydra_plugins/evomoe_searchpath/__init__.py" in held
    assert "hydra_plugins/__init__.py" not in held  # Hydra looks in every folder of this name


def test_command_and_versions(wheel, wheel_metadata):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("entry_points.txt"))
        entries = archive.read(name).decode().splitlines()
    assert "evomoe = evomoe_plugin.cli:main" in entries
    assert "evomoe_quiet_imports = evomoe_quiet_imports:ignore_warnings" in entries
    assert wheel_metadata["Version"] == evomoe_plugin.__version__
    assert f"\nversion: {evomoe_plugin.__version__}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.fixture
def installed(wheel, tmp_path):
    """A site-packages folder with the wheel and fairseq side by side, and an environment for it."""
    import fairseq
    import fairseq_cli

    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    for package in (fairseq, fairseq_cli):  # fairseq looks beside its folder, so that one is real
        folder = Path(package.__path__[0])
        (site / folder.name).mkdir()
        for entry in folder.iterdir():
            (site / folder.name / entry.name).symlink_to(entry)
    return site, {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}


def test_user_dir_by_name_from_any_folder(installed, tmp_path):
    site, environment = installed
    program = """if True:
        import os
        from fairseq import options
        args = options.parse_args_and_arch(options.get_training_parser(), [
            "data", "--task", "language_modeling", "--user-dir", "evomoe_plugin",
            "--arch", "transformer_lm_gpttiny_moe", "--moe-gate-threshold", "0.25"])
        import evomoe_plugin
        print(os.path.realpath(evomoe_plugin.__file__), args.moe_gate_threshold)
    """
    done = run(sys.executable, "-c", program, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [os.path.realpath(site / "evomoe_plugin/__init__.py"), "0.25"]


HYDRA = "--config-name small/evomoe_dts --cfg job task.data=nowhere model.moe_temperature_end=0.25"
HELP = "--help --user-dir evomoe_plugin"


@pytest.mark.parametrize(
    ("module", "arguments", "shown"),
    [
        ("hydra_train", HYDRA, r"^  moe_temperature_end: 0.25$"),  # from its configurations
        ("train", HELP, "--user-dir"),
        pytest.param("eval_lm", HELP, "--user-dir", marks=pytest.mark.slow),
        pytest.param("generate", HELP, "--user-dir", marks=pytest.mark.slow),
    ],
)
def test_commands_of_fairseq_print_no_warning(installed, tmp_path, module, arguments, shown):
    """As their console scripts call them: fairscale is imported before --user-dir is."""
    _, environment = installed
    program = f"import sys; from fairseq_cli.{module} import cli_main; sys.exit(cli_main())"
    environment = {k: v for k, v in environment.items() if k != "PYTHONWARNINGS"}
    done = run(sys.executable, "-c", program, *arguments.split(), cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert re.search(shown, done.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    "first", [pytest.param("fairseq", marks=pytest.mark.slow), "evomoe_plugin"]
)
def test_either_may_be_imported_first(installed, tmp_path, first):
    _, environment = installed
    register = "" if first == "fairseq" else "evomoe_plugin.register(); "
    program = (
        f"import {first}, evomoe_plugin; {register}"
        "from fairseq.models import MODEL_REGISTRY as models; import fairseq.optim as o; "
        "print('transformer_lm_moe' in models, 'fused_adamw' in o.OPTIMIZER_REGISTRY)"
    )
    done = run(sys.executable, "-c", program, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True True\n", "")


# What it requires


@pytest.mark.parametrize(
    ("python", "system", "machine", "fairseq"),
    [
        ("3.11", "linux", "x86_64", "ve-fairseq"),
        ("3.12", "linux", "x86_64", "ve-fairseq"),
        ("3.13", "linux", "x86_64", "fairseq-fixed"),
        ("3.11", "linux", "aarch64", "fairseq-fixed"),
        ("3.12", "darwin", "arm64", "fairseq-fixed"),
        ("3.11", "darwin", "x86_64", "fairseq-fixed"),
        ("3.11", "win32", "AMD64", "fairseq-fixed"),
    ],
)
def test_one_fairseq_for_each_environment(requirements, python, system, machine, fairseq):
    environment = {
        "python_version": python,
        "sys_platform": system,
        "platform_machine": machine,
        "extra": "fairseq",
    }
    chosen = [
        r.name for r in requirements if "fairseq" in r.name and r.marker.evaluate(environment)
    ]
    assert chosen == [fairseq]


def test_the_layer_in_plain_pytorch_requires_torch_alone(requirements):
    assert {r.name for r in requirements if r.marker is None} == {"numpy", "torch"}


def test_unrelated_apex_is_never_required(requirements):
    assert "apex" not in {r.name for r in requirements}


# The lock


def locked():
    """Name to (version, hashes) of the lock file; it may hold nothing else."""
    text = re.sub(r"\\\n", "", (ROOT / "requirements/lock.txt").read_text())
    lines = [line for line in text.splitlines() if line.strip() and not re.match(r"\s*#", line)]
    entry = r"([a-z0-9-]+)==(\S+)(?: ; [^;]*?)?((?:\s+--hash=sha256:[0-9a-f]{64})+)\s*"
    entries = [re.fullmatch(entry, line) for line in lines]
    assert all(entries), [line for line, entry in zip(lines, entries, strict=True) if not entry]
    return {entry[1]: (Version(entry[2]), entry[3].split()) for entry in entries}


def test_lock_leaves_out_torch_and_what_only_a_gpu_needs():
    assert locked().keys().isdisjoint({"torch", "torchaudio"})
    assert not [name for name in locked() if name.startswith(("nvidia", "cuda"))]


def test_lock_has_the_triton_of_the_cuda_build():
    pin = re.search(r"^triton==(\S+)$", (ROOT / "requirements/torch.txt").read_text(), re.MULTILINE)
    version, hashes = locked()["triton"]
    assert version == Version(pin[1])
    assert len(hashes) >= 2  # 3.11 and 3.12
    builds = [r for r in map(Requirement, metadata.requires("torch")) if r.name == "triton"]
    assert all(r.specifier.contains(version) for r in builds)  # none in a CPU build


def test_lock_holds_hashes_for_other_machines_too():
    for name in ("numpy", "pyarrow", "sentencepiece"):
        assert len(locked()[name][1]) > 10, name
    assert len(locked()["ve-fairseq"][1]) == 2  # 3.11 and 3.12


def test_lock_satisfies_the_package_and_torch(requirements):
    pin = re.search(r"^torch==(\S+)$", (ROOT / "requirements/torch.txt").read_text(), re.MULTILINE)
    versions = {name: version for name, (version, _) in locked().items()}
    versions["torch"] = Version(pin[1])
    environment = {"sys_platform": "linux", "platform_machine": "x86_64", "python_version": "3.11"}
    needed = [
        r
        for r in requirements
        if r.marker is None
        or any(r.marker.evaluate({**environment, "extra": extra}) for extra in ("", *IN_LOCK))
    ]
    (torch,) = (r for r in needed if r.name == "torch")
    assert str(torch.specifier) == f">={'.'.join(pin[1].split('.')[:2])}"  # older: not tested
    needed += [
        r for r in map(Requirement, metadata.requires("torch")) if r.marker is None
    ]  # those with one are for a GPU, or extras
    assert len(needed) > 20
    for r in needed:
        assert r.specifier.contains(versions[canonicalize_name(r.name)], prereleases=True), r


# make


def make(*arguments):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    return run("make", "-C", ROOT, "--no-print-directory", *arguments, env=environment)


def test_make_help_lists_every_target_and_the_variable_for_a_gpu():
    shown = make("help").stdout
    assert make().stdout == shown
    (phony,) = re.findall(r"^\.PHONY: (.*) FORCE$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    targets = phony.split()
    assert {"quickstart", "check", "unit", "test", "test-slow", "venv"} <= set(targets)
    for target in targets:
        assert re.search(rf"^  {target} +\w", shown, re.MULTILINE), target
    assert "TORCH=cuda" in shown


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("PYTHON=no-such-python", "error: PYTHON=no-such-python is not a command here"),
        ("TORCH=gpu", "TORCH=gpu: give cuda"),
    ],
)
def test_make_refuses_impossible_choices(tmp_path, choice, message):
    done = make("venv", f"VENV={tmp_path}/env", choice)
    assert done.returncode == 2
    assert message in done.stderr
    assert not list(tmp_path.iterdir())


def test_make_says_that_there_is_no_python_3_12():
    done = make("test-python312", "PYTHON312=no-such-python")
    assert done.returncode == 2
    assert "error: no Python 3.12 here; name one" in done.stderr


def test_make_rejects_an_unsupported_python(tmp_path):
    old = tmp_path / "python3.9"
    old.write_text(
        f'#!/bin/sh\nshift\nexec "{sys.executable}" -c "import sys; '
        'sys.version_info = (3, 9, 1)\n$1"\n'
    )
    old.chmod(0o755)
    done = make("venv", f"VENV={tmp_path}/env", f"PYTHON={old}")
    assert done.returncode == 2
    assert "the lock is for 3.11 and 3.12 on Linux x86_64" in done.stderr
    assert not (tmp_path / "env").exists()


def test_make_keeps_an_environment_that_it_did_not_make(tmp_path):
    mine = tmp_path / "env" / "mine"
    mine.parent.mkdir()
    mine.touch()
    done = make("venv", f"VENV={mine.parent}")
    assert done.returncode == 2
    assert "was not made by make" in done.stderr
    assert mine.exists()
