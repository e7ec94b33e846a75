"""`common.user_dir: evomoe_plugin` in whatever folder Hydra runs, from whichever copy of it."""

from __future__ import annotations

import logging
import os
from typing import Any

from fairseq import utils

from evomoe_plugin.compat.mend import Mend, always

logger = logging.getLogger(__name__)

PACKAGE = __name__.split(".")[0]

upstream_import = utils.import_user_module


def import_user_module(args: Any) -> None:
    """As upstream, but our own package, which is imported since this runs, is left at that."""
    given = getattr(args, "user_dir", None)
    if given is None or os.path.basename(os.path.normpath(given)) != PACKAGE:
        return upstream_import(args)
    folder = os.path.abspath(given)
    imported = os.path.dirname(os.path.dirname(__file__))
    if os.path.exists(folder) and not os.path.samefile(folder, imported):
        logger.warning("--user-dir %s: using %s, which was imported first", folder, imported)
    return None


# Upstream keeps what it has imported as an attribute of whatever the name stands for.
import_user_module.memo = getattr(upstream_import, "memo", set())


def apply() -> None:
    utils.import_user_module = import_user_module


MEND = Mend(
    name="user-dir",
    broken="common.user_dir is not found after Hydra's change of folder, and is 'not globally "
           "unique' where the package is both installed and cloned",
    upstream="fairseq/utils.py: import_user_module",
    remove_when="fairseq takes a user-dir by its package name",
    needed=always("imported once, found everywhere"),
    apply=apply,
)
