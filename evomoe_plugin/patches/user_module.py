"""`common.user_dir: evomoe_plugin` from any working directory, installed or cloned."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable
from typing import Any

from fairseq import utils

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.patches.patch import Patch, always, wrapping

logger = logging.getLogger(__name__)

PACKAGE = __name__.split(".")[0]

# Where the command was typed; Hydra may go elsewhere.
_STARTED_IN = os.getcwd()


def _import_user_module(upstream: Callable, args: Any) -> None:
    """As upstream, but our own package, which is imported already, is not imported again, and
    relative paths start where the command was typed."""
    given = getattr(args, "user_dir", None)
    if given is None:
        return upstream(args)
    if os.path.basename(os.path.normpath(given)) != PACKAGE:
        typed = os.path.join(_STARTED_IN, given)
        found = given if os.path.exists(given) or not os.path.exists(typed) else typed
        if os.path.isfile(found):
            raise OptionError("user_dir", given, "is a file: give the folder of a Python package")
        try:
            return upstream(argparse.Namespace(user_dir=found))
        except FileNotFoundError as error:
            if error.errno is not None:  # of the package itself
                raise
            raise OptionError("user_dir", given, "there is no such folder") from error
    folder = os.path.abspath(given)
    imported = os.path.dirname(os.path.dirname(__file__))
    if os.path.exists(folder) and not os.path.samefile(folder, imported):
        logger.warning("--user-dir %s: using %s, which was imported first", folder, imported)
    return None


PATCH = Patch(
    name="user-dir",
    broken="common.user_dir is not found after Hydra's change of folder, and is 'not globally "
    "unique' where the package is both installed and cloned",
    upstream="fairseq/utils.py: import_user_module",
    remove_when="fairseq takes a user-dir by its package name",
    needed=always("imported once, found everywhere"),
    apply=wrapping(utils, import_user_module=_import_user_module),
)
