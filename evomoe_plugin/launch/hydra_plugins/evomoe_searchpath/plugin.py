"""What makes fairseq's Hydra commands know this package before they compose a configuration.

`common.user_dir` is imported after composition: too late for our models, and for the gates of a
user's own package, to be fields of the configuration, and for the patches to take part in how the
run starts. Every Hydra program of the environment loads this; those that are not fairseq's are left
alone.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

PACKAGE = "evomoe_plugin"


class EvoMoESearchPath(SearchPathPlugin):
    """Imports the package, and adds its `hydra_configs` to where configurations are sought."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if "fairseq" not in sys.modules:
            return
        package = Path(importlib.import_module(PACKAGE).__path__[0])
        import_user_dir(sys.argv[1:])
        for parent in (package, package.parent):  # installed, or cloned
            folder = parent / "hydra_configs"
            if folder.is_dir():
                search_path.append(provider=PACKAGE, path=f"file://{folder}")
                break


def import_user_dir(arguments: list[str]) -> None:
    """Import the package that an override `common.user_dir=…` names, as fairseq would later."""
    for argument in arguments:
        name, _, value = argument.lstrip("+").partition("=")
        if name == "common.user_dir":
            from fairseq import utils

            utils.import_user_module(argparse.Namespace(user_dir=value.strip("'\"")))
