"""The registry of gates, by the names of `--moe-gate`, and their options."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.options import ModelOptions
from evomoe_plugin.gates.gate import Gate

_GATES: dict[str, type[Gate]] = {}
_listeners: list[Callable[[type[Gate]], None]] = []
_FORMER_FLAGS = (
    "SCORERS LOSSES DEFAULT_AUX STATS HAS_LOGITS TAKES_NULL TAKES_CAPACITY "
    "HAS_WEIGHTS LEARNS_FROM_ZERO KEEPS_ALIKE"
).split()


def register_gate(name: str) -> Callable[[type[Gate]], type[Gate]]:
    """Class decorator: register a gate as `--moe-gate NAME`, and its options as flags.

    Raises:
        ValueError: the name is taken, an option cannot become a flag, or the class declares what
            it supports by the class attributes of before `Capabilities`.
    """

    def register(cls: type[Gate]) -> type[Gate]:
        if _GATES.get(name, cls) is not cls:
            raise ValueError(f"a gate named {name} is already registered: {_GATES[name]}")
        if flags := [name for name in _FORMER_FLAGS if hasattr(cls, name)]:
            raise ValueError(
                f"{cls.__name__}: {', '.join(flags)} have no effect any more: give "
                "capabilities = Capabilities(…)"
            )
        for option in own_options(cls):
            _check_option(cls, option)
        for listener in _listeners:
            listener(cls)
        _GATES[name] = cls
        return cls

    return register


def _check_option(cls: type[Gate], option: dataclasses.Field) -> None:
    wanted = {
        "must be named moe_…, like all options of gates": option.name.startswith("moe_"),
        "needs a default value (no default_factory)": option.default is not dataclasses.MISSING,
        'needs a help text: field(default=…, metadata={"help": "…"})': "help" in option.metadata,
    }
    for rule, holds in wanted.items():
        if not holds:
            raise ValueError(f"{cls.__name__}: the option {option.name} {rule}")


def on_registration(listener: Callable[[type[Gate]], None]) -> None:
    """Call `listener(gate)` for every gate that is registered from now on."""
    _listeners.append(listener)


def gate_names() -> list[str]:
    """Names of the registered gates, sorted."""
    return sorted(_GATES)


def gate_class(name: str) -> type[Gate]:
    """The gate registered as `name`; raises `OptionError` if there is none."""
    if name not in _GATES:
        raise OptionError("moe_gate", name, f"unknown gate; one of: {', '.join(gate_names())}")
    return _GATES[name]


def own_options(cls: type[Gate]) -> list[dataclasses.Field]:
    """The options of a gate, without those of every model."""
    of_models = ModelOptions.__dataclass_fields__
    return [
        field for field in dataclasses.fields(cls.Options) if of_models.get(field.name) is not field
    ]


def option_fields() -> dict[str, dataclasses.Field]:
    """The options of all registered gates, by name."""
    return {field.name: field for name in gate_names() for field in own_options(_GATES[name])}
