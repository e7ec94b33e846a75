"""`--help` lists the options of the chosen architecture, task and criterion."""

from __future__ import annotations

import contextlib
import io
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from typing import Any

from fairseq import options

from evomoe_plugin.patches.patch import Patch, always, wrapping

_HELP = {"-h", "--help"}


def _parse(
    upstream: Callable,
    parser: ArgumentParser,
    input_args: Sequence[str] | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """As upstream, but `--help` is answered once the parser has all options."""
    given = list(sys.argv[1:] if input_args is None else input_args)
    if not _HELP & set(given):
        return upstream(parser, input_args, *args, **kwargs)
    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit, RuntimeError):
        # Whatever is missing or wrong, the parser has all options by the time it is noticed.
        upstream(parser, [word for word in given if word not in _HELP], *args, **kwargs)
    parser.print_help()
    raise SystemExit(0)


PATCH = Patch(
    name="help",
    broken="fairseq-train --arch … --help shows none of the options of the architecture, task, "
    "criterion and optimizer",
    upstream="fairseq/options.py: parse_args_and_arch parses once before it adds them",
    remove_when="fairseq adds them first",
    needed=always("options of the architecture"),
    apply=wrapping(options, parse_args_and_arch=_parse),
)
