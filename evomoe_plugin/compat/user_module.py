"""`common.user_dir: evomoe_plugin` in whatever folder Hydra runs, from whichever copy of it."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

from fairseq import utils

from evomoe_plugin.compat.mend import Mend, always, wrap

logger = logging.getLogger(__name__)

PACKAGE = __name__.split(".")[0]

def _import_user_module(upstream: Callable, args: Any) -> None:
    """As upstream, but our own package, which is imported since this runs, is left at that."""
    given = getattr(args, "user_dir", None)
    if given is None or os.path.basename(os.path.normpath(given)) != PACKAGE:
        return upstream(args)
    folder = os.path.abspath(given)
    imported = os.path.dirname(os.path.dirname(__file__))
    if os.path.exists(folder) and not os.path.samefile(folder, imported):
        logger.warning("--user-dir %s: using %s, which was imported first", folder, imported)
    return None


@functools.cache
def apply() -> None:
    wrap(utils, "import_user_module", _import_user_module)


MEND = Mend(
    name="user-dir",
    broken="common.user_dir is not found after Hydra's change of folder, and is 'not globally "
           "unique' where the package is both installed and cloned",
    upstream="fairseq/utils.py: import_user_module",
    remove_when="fairseq takes a user-dir by its package name",
    needed=always("imported once, found everywhere"),
    apply=apply,
)
