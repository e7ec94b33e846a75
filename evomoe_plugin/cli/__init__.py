"""The `evomoe` command. A verb is a module here: `HELP`, `add_arguments(parser)`, `run(args)`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

import evomoe_plugin
from evomoe_plugin.cli.user_dir import import_user_dir

VERBS = ("doctor", "prepare", "plot", "upcycle", "import-hf", "generate", "export",
         "checkpoint")
# Those that take the gates and architectures of a user's own package.
TAKE_USER_DIR = ("upcycle", "generate", "export")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status. What users can put right is told in one line."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        status = _run(argv)
        sys.stdout.flush()  # a pipe that was closed shall be noticed here, not after us
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as a shell reports a command that SIGPIPE ended
    except Exception as error:
        told = _told(error)
        if told is None:
            raise
        message, status = told
        print(f"error: {message}", file=sys.stderr)
    return status


def _run(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="evomoe", description="Beside fairseq's own commands, to which --user-dir "
        "evomoe_plugin brings the models: what checks, prepares and shows.")
    parser.add_argument("--version", action="version",
                        version=f"evomoe_plugin {evomoe_plugin.__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    chosen = next((word for word in argv if not word.startswith("-")), None)
    for name in VERBS:
        verb = import_module(f"evomoe_plugin.cli.{name.replace('-', '_')}")
        subparser = verbs.add_parser(name, help=verb.HELP, description=verb.HELP)
        if name == chosen:
            if name in TAKE_USER_DIR:
                import_user_dir(subparser, argv)
            verb.add_arguments(subparser)
            subparser.set_defaults(run=verb.run)
    args = parser.parse_args(argv)
    if args.verb is None:
        parser.print_help(sys.stderr)
        return 2
    return args.run(args)


def _told(error: Exception) -> tuple[str, int] | None:
    """What to print and the exit status, or None where only a traceback will do."""
    # By the attribute of `OptionError` and `RunFailed`: importing `patches` could fail for the very
    # reason that is to be told.
    status = getattr(error, "exit_status", None)
    if status is not None:
        return str(error), status
    if evomoe_plugin.fairseq_error is not None:
        return f"fairseq cannot be imported ({evomoe_plugin.fairseq_error}); " \
               "`evomoe doctor` tells why", 1
    if isinstance(error, OSError):
        return str(error), 1
    return None
