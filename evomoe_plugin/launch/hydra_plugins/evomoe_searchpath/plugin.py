"""What makes fairseq's Hydra commands know this package before they compose a configuration.

`common.user_dir` is imported after composition: too late for our models, and for the gates of a
user's own package, to be fields of the configuration, and for the patches to take part in how the
run starts. Every Hydra program of the environment loads this; those that are not fairseq's, and
runs of fairseq that do not name this package, are left alone.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
import zipfile
from pathlib import Path

from hydra._internal.utils import get_args_parser  # fairseq_cli.hydra_train reads its name so too
from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

PACKAGE = "evomoe_plugin"
_MOST = 1 << 24  # bytes of a checkpoint's pickle


class EvoMoESearchPath(SearchPathPlugin):
    """Imports the package, and adds its `hydra_configs` to where configurations are sought."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if "fairseq" not in sys.modules or not is_wanted(sys.argv[1:]):
            return
        importlib.import_module(PACKAGE)
        importlib.import_module(f"{PACKAGE}.launch.hydra_errors").explain()
        import_user_dir(sys.argv[1:])
        folder = own_configs()
        if folder is not None:
            search_path.append(provider=PACKAGE, path=f"file://{folder}")


def is_wanted(arguments: list[str]) -> bool:
    """Whether the command line is one of this package.

    It is if the package is imported, if the user_dir or a configuration in the given folder names
    it, if the configuration or its folder is one of its own, or if `--path` names a checkpoint of
    an MoE model.
    """
    if PACKAGE in sys.modules:
        return True
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--path", default="")
    paths = parser.parse_known_args(arguments)[0].path
    if any(is_moe_checkpoint(path) for path in paths.split(":") if path):
        return True
    given, _ = get_args_parser().parse_known_args(arguments)
    user_dir = user_dir_of(arguments)
    if user_dir is not None and names_package(Path(user_dir)):
        return True
    name = f"{(given.config_name or '').removesuffix('.yaml')}.yaml"
    folders = [Path(folder) for folder in (given.config_dir, given.config_path) if folder]
    if any((folder / name).is_file() for folder in folders):
        return any(_names(file) for f in folders for file in f.rglob("*.yaml"))
    own = own_configs()
    if own is None:
        return False
    return (own / name).is_file() or own.resolve() in (folder.resolve() for folder in folders)


def is_moe_checkpoint(path: str) -> bool:
    """Whether a checkpoint's configuration has the options of MoE layers.

    The bytes of its pickle are searched for their name; nothing is unpickled.
    """
    try:
        with zipfile.ZipFile(path) as file:
            pickles = [name for name in file.namelist() if name.endswith("data.pkl")]
            return any(b"moe_expert_count" in _beginning(file, name) for name in pickles)
    except Exception:  # zipfile raises many kinds for a damaged file, which the command reports
        return False


def _beginning(file: zipfile.ZipFile, name: str) -> bytes:
    """A pickle refers to the tensors beside it, and is short; what claims more is not read."""
    with file.open(name) as content:
        return content.read(_MOST)


def names_package(user_dir: Path) -> bool:
    """Whether a user_dir is this package, or imports it."""
    return user_dir.name == PACKAGE or any(_names(file) for file in user_dir.rglob("*.py"))


def _names(file: Path) -> bool:
    """Whether a file has the package's name; one that cannot be read is not ours to complain of."""
    try:
        return PACKAGE.encode() in file.read_bytes()
    except OSError:
        return False


def own_configs() -> Path | None:
    """The package's `hydra_configs`, installed or cloned."""
    found = importlib.util.find_spec(PACKAGE)
    for package in found.submodule_search_locations or () if found else ():
        for parent in (Path(package), Path(package).parent):
            if (parent / "hydra_configs").is_dir():
                return parent / "hydra_configs"
    return None


def user_dir_of(arguments: list[str]) -> str | None:
    """The value of an override `common.user_dir=…`; None where it refers to what is not set."""
    for argument in arguments:
        name, _, value = argument.lstrip("+").partition("=")
        if name == "common.user_dir":
            try:
                return OmegaConf.create({name: value.strip("'\"")})[name]
            except OmegaConfBaseException:  # the command reports it
                return None
    return None


def import_user_dir(arguments: list[str]) -> None:
    """Import the package that an override `common.user_dir=…` names, as fairseq would later."""
    user_dir = user_dir_of(arguments)
    if user_dir is not None:
        from fairseq import utils

        utils.import_user_module(argparse.Namespace(user_dir=user_dir))
