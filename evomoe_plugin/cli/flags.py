"""Flags of verbs from their defaults, and options from parsed flags."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any, TypeVar

T = TypeVar("T")


def flag(
    parser: argparse._ActionsContainer, name: str, default: Any, help: str, **given: Any
) -> None:
    """Add the flag `name`, "--flag" or "--flag METAVAR".

    Args:
        default: False makes a switch, [] a repeatable flag, a type or function parses the value
            (absent: None), and any other value gives the type and is named in the help.
        given: further arguments of `add_argument`.
    """
    name, *metavar = name.split(" ", 1)
    if metavar:
        given["metavar"] = metavar[0]
    if default is False:
        given["action"] = "store_true"
    elif default == []:
        given |= {"action": "append", "default": []}
    elif callable(default):
        given["type"] = default
    else:
        given = {"type": type(default), "default": default, **given}
        help += " (default: %(default)s)" if default != "" else ""
    parser.add_argument(name, help=help, **given)


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add `--data` of verbs that load a trained model."""
    flag(
        parser,
        "--data DIR",
        str,
        "the folder that evomoe prepare wrote, with dict.txt and the "
        "tokenizer (default: the one that the checkpoint was trained "
        "with)",
    )


def defaults(options: type) -> dict[str, Any]:
    """Default of each field of a dataclass."""
    return {f.name: f.default for f in dataclasses.fields(options)}


def parsed(options: type[T], args: argparse.Namespace) -> T:
    """The dataclass `options` with the flags of its fields' names."""
    given = {name: getattr(args, name) for name in defaults(options)}
    return options(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
