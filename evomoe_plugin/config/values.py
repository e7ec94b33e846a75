"""Checks and parsers of single values of options."""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from typing import Any

from evomoe_plugin.config.errors import OptionError


def parse_model_overrides(text: str) -> dict[str, Any]:
    """The value of `--model-overrides`: option -> value, or an `OptionError`."""
    try:
        overrides = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        overrides = None
    if not isinstance(overrides, dict):
        raise OptionError(
            "model_overrides", text, "is no dictionary of Python: give \"{'OPTION': value}\""
        )
    return overrides


def parse_bool(option: str, value: Any) -> bool:
    """`value` (bool, or true/false in any case) as a bool, or an `OptionError`."""
    text = str(value).strip().lower()
    if text not in ("true", "false"):
        raise OptionError(option, value, "give true or false")
    return text == "true"


def check_choice(options: object, option: str, allowed: Sequence[str | None]) -> None:
    """Raise `OptionError` unless the option's value is one of `allowed`."""
    if getattr(options, option) not in allowed:
        names = ", ".join(filter(None, allowed))
        raise OptionError(option, getattr(options, option), f"one of: {names}")


def check_number(options: object, option: str, interval: str, remedy: str) -> None:
    """Raise `OptionError` with `remedy` unless the option's value is finite and in `interval`.

    None, the value of an option that was not given, passes.

    Args:
        interval: such as "[0, 1)" for at least 0 and less than 1, or "(0, inf)".
    """
    value = getattr(options, option)
    if value is not None and not in_interval(value, interval):
        raise OptionError(option, value, remedy)


def in_interval(value: float, interval: str) -> bool:
    """Whether a number is finite and in an interval such as "[0, 1)"."""
    low, high = map(float, interval[1:-1].split(","))
    bounds = (interval[0] == "[" and value == low) or (interval[-1] == "]" and value == high)
    return math.isfinite(value) and (low < value < high or bounds)
