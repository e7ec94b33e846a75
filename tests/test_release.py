"""The files of a release: accepted by the package index, complete, and enough by themselves."""

import importlib.metadata as metadata
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import evomoe_plugin

ROOT = Path(__file__).parents[1]
PARTS = "evomoe_plugin hydra_configs LICENSE README.md pyproject.toml setup.py".split()


def run(*command, **options):
    return subprocess.run(
        [str(word) for word in command], text=True, capture_output=True, timeout=300, **options
    )


def built(kind: str, source: Path, out: Path) -> Path:
    """A `wheel` or `sdist` of a folder, without network."""
    build = f"import setuptools.build_meta as b; print(b.build_{kind}({str(out)!r}))"
    done = run(sys.executable, "-c", build, cwd=source)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """The source distribution of this checkout, and the wheel that is built of it alone."""
    folder = tmp_path_factory.mktemp("release")
    source = folder / "source"
    source.mkdir()
    for name in PARTS:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, source)
    sdist = built("sdist", source, folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return sdist, built("wheel", unpacked, folder)


@pytest.mark.slow
def test_the_package_index_accepts_it(release):
    done = run(sys.executable, "-m", "twine", "check", "--strict", *release)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == 2


@pytest.mark.slow
def test_a_wheel_of_the_source_distribution_is_complete(release):
    with zipfile.ZipFile(release[1]) as archive:
        held = {name for name in archive.namelist() if name.endswith(".py")}
    ours = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("evomoe_plugin/**/*.py")}
    hydra = "evomoe_plugin/launch/"  # installed beside the package
    mapped = {name.removeprefix(hydra) if "hydra_plugins/" in name else name for name in ours}
    assert held == mapped | {"evomoe_quiet_imports/__init__.py"}


def link_with_requirements(names: list[str], site: Path) -> None:
    """Installed distributions and all that they require, as links in another environment."""
    done = set()
    while names:
        name = names.pop()
        if name in done:
            continue
        done.add(name)
        distribution = metadata.distribution(name)
        for top in {path.parts[0] for path in distribution.files}:
            link = site / top
            if top not in ("..", "__pycache__") and not link.exists():
                link.symlink_to(distribution.locate_file(top))
        required = map(Requirement, distribution.requires or [])
        names += [r.name for r in required if r.marker is None or r.marker.evaluate({"extra": ""})]


TRAIN = """
import torch
from evomoe_plugin import MoELayer

moe = MoELayer(8, 16, num_experts=4, gate="dense_to_sparse", temperature_updates=2)
for _ in range(3):
    routed = moe(torch.randn(5, 8))
    (routed.output.sum() + routed.aux_loss).backward()
    moe.finish_update(routed.stats)
print(moe(torch.randn(5, 8)).summary()["experts_per_token"])
"""


@pytest.mark.slow
def test_the_wheel_works_with_torch_alone_from_another_folder(release, tmp_path):
    environment = tmp_path / "environment"
    assert run(sys.executable, "-m", "venv", "--without-pip", environment).returncode == 0
    python = environment / "bin/python"
    (site,) = environment.glob("lib/python*/site-packages")
    link_with_requirements(["torch", "numpy"], site)
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-index")
    done = run(*pip, "--no-deps", release[1])
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    bare = {"cwd": folder, "env": {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}}

    trained = run(python, "-c", TRAIN, **bare)
    assert (trained.returncode, trained.stdout) == (0, "1.0\n"), trained.stderr
    version = run(environment / "bin/evomoe", "--version", **bare)
    assert version.stdout == f"evomoe_plugin {evomoe_plugin.__version__}\n"
    for verb in ("prepare x --out y", "generate --path x --prompt y", "doctor"):
        done = run(environment / "bin/evomoe", *verb.split(), **bare)
        (line,) = done.stderr.splitlines()
        assert line.endswith("is not installed: pip install 'evomoe_plugin[fairseq]'")
        assert done.returncode == 1
