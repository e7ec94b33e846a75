"""Functions that other packages have the trainer call, and when."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Check = Callable[[Any, dict[str, Any], str, bool], None]
"""Called with the trainer, fairseq's state as the checkpoint has it, the file's name, and whether
the optimizer starts afresh and updates count from 0. Raises `OptionError` to refuse it."""

Callback = Callable[[Any], None]
"""Called with the trainer."""

_Function = TypeVar("_Function", Check, Callback)

LOADING: list[Check] = []
TRAIN_START: list[Callback] = []
UPDATE_END: list[Callback] = []


def _register(functions: list[_Function], function: _Function) -> None:
    if function not in functions:
        functions.append(function)


def before_loading(check: Check) -> None:
    """Call `check` for each checkpoint that a trainer reads, on the ranks that read it."""
    _register(LOADING, check)


def at_train_start(callback: Callback) -> None:
    """Call `callback` on every rank of a run that found no checkpoint to resume from, before its
    first update."""
    _register(TRAIN_START, callback)


def after_update(callback: Callback) -> None:
    """Call `callback` on every rank after each update, after the model's own `finish_update` and
    before anything is logged or saved."""
    _register(UPDATE_END, callback)
