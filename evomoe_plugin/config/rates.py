"""Methods that make experts from one, and their rates."""

from __future__ import annotations

from typing import NamedTuple

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.options import ModelOptions
from evomoe_plugin.config.values import in_interval

SPAWN_METHODS = ("copy", "mask", "noise", "reinit")


class Rate(NamedTuple):
    """Valid rates of a method that changes experts; 0 would equal `copy`."""

    default: float
    interval: str
    remedy: str


# The defaults of mask and noise are ours; that of reinit is Drop-Upcycling's (arXiv 2502.19261).
SPAWN_RATES = {
    "mask": Rate(0.3, "(0, 1)", "it is a share of the weights: give more than 0 and less than 1"),
    "noise": Rate(
        0.1, "(0, inf)", "give a number above 0, relative to the weights' standard deviation"
    ),
    "reinit": Rate(
        0.5, "(0, 1]", "it is a share of the hidden units: give more than 0 and at most 1"
    ),
}


def resolved_rate(method: str, rate: float | None) -> float:
    """`rate`, or the default of `method`; 0 for methods without one."""
    if rate is not None:
        return rate
    return SPAWN_RATES[method].default if method in SPAWN_RATES else 0.0


def check_rate(option: str, method: str, rate: float | None) -> None:
    """Raise `OptionError` unless `rate` is valid for `method`; None, the default, always is."""
    if rate is None:
        return
    if method not in SPAWN_RATES:
        raise OptionError(
            option,
            rate,
            f"the method {method} has no rate: leave it out, or give "
            f"one of the methods {', '.join(SPAWN_RATES)}",
        )
    if not in_interval(rate, SPAWN_RATES[method].interval):
        raise OptionError(option, rate, SPAWN_RATES[method].remedy)


def spawn_rate(options: ModelOptions) -> float:
    """The rate of the spawn method, with the default resolved."""
    return resolved_rate(options.moe_spawn_method, options.moe_spawn_rate)
