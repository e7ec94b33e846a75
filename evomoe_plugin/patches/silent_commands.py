"""fairseq-eval-lm and fairseq-validate, which log nothing where iopath is installed."""

from __future__ import annotations

import logging
import os
import sys

from evomoe_plugin.patches.patch import Patch


def _unasked_handler() -> logging.Handler | None:
    """The handler that `logging.debug` adds to a root logger without one, if there is one."""
    root = logging.getLogger()
    if len(root.handlers) != 1 or root.level != logging.WARNING:
        return None
    handler = root.handlers[0]
    unasked = (
        type(handler) is logging.StreamHandler
        and handler.stream is sys.stderr
        and getattr(handler.formatter, "_fmt", None) == logging.BASIC_FORMAT
    )
    return handler if unasked else None


def _command() -> str | None:
    """The module name of the fairseq command that this process runs."""
    main = getattr(getattr(sys.modules["__main__"], "__spec__", None), "name", "")
    return next((n for n in (main, *sys.modules) if n.startswith("fairseq_cli.")), None)


def needed() -> str | None:
    if _command() and _unasked_handler():
        return "fairseq logged before it set up its logging"
    return None


def apply() -> None:
    handler = _unasked_handler()
    if handler is not None:
        logging.getLogger().removeHandler(handler)
    if _command() != "fairseq_cli.generate":  # sets up its own later, to --results-path
        logging.basicConfig(
            format="%(asctime)s | %(levelname)s | %(name)s | %(message)s",
            datefmt="%Y-%m-%d %H:%M:%S",
            level=os.environ.get("LOGLEVEL", "INFO").upper(),
            stream=sys.stdout,
        )


PATCH = Patch(
    name="silent-commands",
    broken="fairseq-eval-lm, -validate and -generate log nothing, not even the perplexity",
    upstream="fairseq/file_io.py calls logging.debug while it is imported, which sets up the root "
    "logger before fairseq_cli/eval_lm.py and others do",
    remove_when="fairseq's modules log through loggers of their own",
    needed=needed,
    apply=apply,
)
