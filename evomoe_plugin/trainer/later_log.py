"""What updates log, read from a GPU when someone looks at it: no update waits for it.

fairseq's meters are read by functions of `fairseq.logging.metrics`; `install` has them call `flush`
first, which takes the numbers of all updates since the last time from the device in one transfer
and logs them as the updates would have: under the same names, in the same order, with the same
arithmetic.

A run that ends by an exception loses nothing by it. What waits then is of updates since the last
line of the log, and fairseq prints no line of part of an interval, on a CPU neither; crash.pt has
the meters of those updates, since saving it reads them. Nothing is flushed at exit: after an error
of the device nothing on it can be read, and another error would hide the first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fairseq.logging import metrics

from evomoe_plugin.trainer.transfers import on_host

MOST = 100
"""Updates whose numbers are kept on the device, at most."""

_READERS = (
    "get_meter get_meters get_smoothed_value get_smoothed_values "
    "load_state_dict reset reset_meter reset_meters state_dict"
).split()
_waiting: list[tuple[dict[str, Any], Callable[..., Any], tuple[Any, ...]]] = []


def add(log: Callable[..., Any], *values: Any) -> None:
    """Call `log` later, with the tensors in `values` on the host and the meters of now."""
    _waiting.append((dict(metrics._active_aggregators), log, values))
    if len(_waiting) >= MOST:
        flush()


def flush() -> None:
    """Log what waits."""
    waiting = list(_waiting)
    _waiting.clear()
    of_updates = on_host([values for *_, values in waiting])
    for (aggregators, log, _), values in zip(waiting, of_updates, strict=True):
        with _aggregating(aggregators):
            log(*values)


def install() -> None:
    """Have fairseq's functions that read or reset meters call `flush` first."""
    for name in _READERS:
        function = getattr(metrics, name)
        if not hasattr(function, "__wrapped__"):
            setattr(metrics, name, _flushing(function))


def _flushing(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def flushed(*args: Any, **kwargs: Any) -> Any:
        flush()
        return function(*args, **kwargs)

    return flushed


@contextmanager
def _aggregating(aggregators: dict[str, Any]) -> Iterator[None]:
    active = metrics._active_aggregators
    now = dict(active)
    active.clear()
    active.update(aggregators)
    try:
        yield
    finally:
        active.clear()
        active.update(now)
