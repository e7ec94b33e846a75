"""`fairseq-validate` without `--task`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from fairseq import options

from evomoe_plugin.checkpoint.reading import read_task
from evomoe_plugin.config.errors import one_line_errors
from evomoe_plugin.patches.patch import Patch, always, wrapping


def _parse_args_and_arch(
    upstream: Callable,
    parser: argparse.ArgumentParser,
    input_args: Sequence[str] | None = None,
    **kwargs: Any,
) -> Any:
    """As upstream. Where a parser has no default task, it is that of the checkpoint in `--path`."""
    if not any(action.dest == "task" for action in parser._actions):
        return upstream(parser, input_args=input_args, **kwargs)
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--task")
    early.add_argument("--path")
    given, _ = early.parse_known_args(input_args)
    if (given.task or parser.get_default("task")) is None:
        with one_line_errors():
            task = "language_modeling" if given.path is None else read_task("path", given.path)
        parser.set_defaults(task=task)
    return upstream(parser, input_args=input_args, **kwargs)


PATCH = Patch(
    name="validated-task",
    broken="fairseq-validate without --task ends in KeyError: None",
    upstream="fairseq/options.py: get_validation_parser has no default task, parse_args_and_arch "
    "needs one",
    remove_when="fairseq takes the task from the checkpoint there, as it does afterwards",
    needed=always("the checkpoint says what its task is"),
    apply=wrapping(options, parse_args_and_arch=_parse_args_and_arch),
)
