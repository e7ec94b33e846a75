"""Options that fairseq parses, and then trips over."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from fairseq.dataclass import utils

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.patches.patch import Patch, always, wrap


def _compose(upstream: Callable, *args: Any, **kwargs: Any) -> Any:
    try:
        return upstream(*args, **kwargs)
    except Exception as error:  # of hydra or omegaconf, of several kinds
        text = " ".join(f"{error}: {error.__cause__ or ''}".split())
        missing = re.search(r"field '(?:\w+\.)*(\w+)' is not Optional", text)
        if missing:
            raise OptionError(missing[1], "(not given)", "give it") from error
        found = re.search(r"Error merging override (?:\w+\.)*(\w+)=(\S*)", text)
        if found:
            reason = text[found.end() :].strip(" :")[:200]
            raise OptionError(found[1], found[2], reason or "is not valid") from error
        raise


def _override_attr(upstream: Callable, node: str, kind: Any, args: Any) -> Any:
    try:
        return upstream(node, kind, args)
    except OptionError:  # of a dataclass in this one
        raise
    except (ValueError, SyntaxError) as error:  # of a text that is no value of Python
        for name, value in vars(args).items():
            if name in kind.__dataclass_fields__ and _is_refused(upstream, kind, name, value):
                reason = str(error).partition(":")[0]  # without the object's address
                raise OptionError(name, value, f"is not valid: {reason}") from error
        raise


def _is_refused(upstream: Callable, kind: Any, name: str, value: Any) -> bool:
    """Whether it is this value: the others have their defaults."""
    try:
        upstream("", kind, Namespace(**{name: value}))
    except (ValueError, SyntaxError):
        return True
    return False


def apply() -> None:
    wrap(utils, "_override_attr", _override_attr)
    wrap(utils, "compose", _compose)
    # Of all options, on one line.
    utils.logger.addFilter(
        lambda record: not str(record.msg).startswith("Error when composing. Overrides")
    )


PATCH = Patch(
    name="refused-options",
    broken="a value that fairseq's configuration does not take, as polynomial_decay without "
    "--total-num-update, ends in a traceback of hydra",
    upstream="fairseq/dataclass/utils.py: convert_namespace_to_omegaconf",
    remove_when="fairseq names the option",
    needed=always("options are refused in one line"),
    apply=apply,
)
