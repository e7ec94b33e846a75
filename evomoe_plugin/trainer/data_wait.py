"""How long training waits for its batches."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from fairseq.data import iterators
from fairseq.logging import metrics
from fairseq.trainer import Trainer

from evomoe_plugin.patches.patch import Patch, always, wrap
from evomoe_plugin.trainer.update_end import after_update

# Since the last update, in this thread.
_seconds: ContextVar[float] = ContextVar("seconds waited for batches", default=0.0)


def _next(upstream: Callable, batches: iterators.GroupedIterator) -> Any:
    start = time.perf_counter()
    try:
        return upstream(batches)
    finally:
        _seconds.set(_seconds.get() + time.perf_counter() - start)


def _log(_trainer: Trainer) -> None:
    metrics.log_scalar("data_wait_ms", 1000 * _seconds.get(), priority=1510, round=2)
    _seconds.set(0.0)


@functools.cache
def apply() -> None:
    wrap(iterators.GroupedIterator, "__next__", _next)  # all batches of an update
    after_update(_log)


PATCH = Patch(
    name="data-wait",
    broken="nothing tells whether training waits for its data; a nearly empty buffer is told to "
           "who logs at the level debug, after five minutes",
    upstream="fairseq/data/iterators.py: BufferedIterator",
    remove_when="fairseq logs it",
    needed=always("a step can be slow for want of data"),
    apply=apply,
)
