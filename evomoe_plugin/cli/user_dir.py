"""`--user-dir`: the package that registers a user's own gates and architectures."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

import evomoe_plugin


def import_user_dir(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Give `parser` the option, and import the package that `argv` names with it.

    At once, as `fairseq-train` does: the options of a user's gate are flags of the verb.

    Raises:
        OptionError: there is no such package.
    """
    parser.add_argument(
        "--user-dir",
        metavar="DIR",
        help="the package that registers gates or architectures of your own",
    )
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--user-dir")
    given, _ = early.parse_known_args(argv)
    if given.user_dir is None:
        return
    evomoe_plugin.register()
    from fairseq import utils

    from evomoe_plugin.config.errors import OptionError

    try:
        utils.import_user_module(given)
    except FileNotFoundError:
        raise OptionError(
            "user_dir",
            given.user_dir,
            f"there is no such package in {os.getcwd()}: give its folder",
        ) from None
