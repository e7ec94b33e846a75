"""Command lines of the published systems, in fairseq's commands."""

from __future__ import annotations

import functools
import logging
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from typing import Any

from fairseq import options

from evomoe_plugin.config.errors import one_line_errors
from evomoe_plugin.config.published_flags import translate
from evomoe_plugin.patches.patch import wrap

logger = logging.getLogger(__name__)


def _parse(
    upstream: Callable,
    parser: ArgumentParser,
    input_args: Sequence[str] | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    with one_line_errors():
        words, lines = translate(sys.argv[1:] if input_args is None else input_args)
    for line in lines:
        logger.info(line)
    return upstream(parser, words, *args, **kwargs)


@functools.cache
def install() -> None:
    """Translate published flags in all of fairseq's commands."""
    wrap(options, "parse_args_and_arch", _parse)
