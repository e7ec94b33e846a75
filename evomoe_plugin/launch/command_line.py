"""Command lines of the published systems, in fairseq's commands."""

from __future__ import annotations

import difflib
import functools
import logging
import sys
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Callable, Sequence
from typing import Any

from fairseq import options
from fairseq.criterions import CRITERION_DATACLASS_REGISTRY
from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import MODEL_DATACLASS_REGISTRY

from evomoe_plugin.config.errors import OptionError, one_line_errors
from evomoe_plugin.config.published_flags import leave_out, translate, without_effect
from evomoe_plugin.patches.patch import wrap

logger = logging.getLogger(__name__)


def _parse(
    upstream: Callable,
    parser: ArgumentParser,
    input_args: Sequence[str] | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    words = sys.argv[1:] if input_args is None else input_args
    with one_line_errors():
        if "--max-update" in parser._option_string_actions:  # fairseq-generate has --arch too
            words, lines = translate(words)
        else:
            words, lines = _without_model_options(parser, words)
            _refuse_in_one_line(parser)
        for line in lines:
            logger.info(line)
        return upstream(parser, words, *args, **kwargs)


def _without_model_options(
    parser: ArgumentParser, words: Sequence[str]
) -> tuple[list[str], list[str]]:
    """The command line of a command that evaluates a checkpoint, without options of MoE models that
    published command lines repeat there, and a line on each."""
    rest, lines = leave_out(words)
    of_models = ArgumentParser(add_help=False, allow_abbrev=False, argument_default=SUPPRESS)
    for dataclass in (
        MODEL_DATACLASS_REGISTRY["transformer_moe"],
        CRITERION_DATACLASS_REGISTRY["moe_label_smoothed_cross_entropy"],
    ):
        gen_parser_from_dataclass(of_models, dataclass(), delete_default=True)
    left_out = ArgumentParser(add_help=False, allow_abbrev=False)
    for action in of_models._actions:
        name = action.option_strings[0]
        if "-moe-" in name and name not in parser._option_string_actions:
            action.type = action.choices = None
            left_out._add_action(action)
    given, rest = left_out.parse_known_args(rest)
    for name, value in vars(given).items():
        flag = f"--{name.replace('_', '-')}"
        lines.append(without_effect(flag, "" if value is True else str(value)))
    return rest, lines


def _refuse_in_one_line(parser: ArgumentParser) -> None:
    """Name an option that the command lacks, without the usage of all others."""
    upstream = parser.error

    def error(message: str) -> Any:
        _, _, unknown = message.partition("unrecognized arguments: ")
        if unknown.startswith("--"):
            option, _, value = unknown.partition(" --")[0].replace("=", " ", 1).partition(" ")
            similar = difflib.get_close_matches(option, parser._option_string_actions, 1, 0.8)
            raise OptionError(
                option,
                value or "(given)",
                f"this command has no such option; did you mean {similar[0]}?"
                if similar
                else "this command has no such option, and how the model is built and trained is "
                "in its checkpoint: leave it out",
            )
        return upstream(message)

    parser.error = error  # type: ignore[method-assign]


@functools.cache
def install() -> None:
    """Translate published flags in all of fairseq's commands."""
    wrap(options, "parse_args_and_arch", _parse)
