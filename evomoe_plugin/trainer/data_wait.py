"""How long training waits for its batches."""

from __future__ import annotations

import time
from typing import Any

from fairseq.data import iterators

_seconds = 0.0


class TimedGroupedIterator(iterators.GroupedIterator):
    """fairseq's iterator over the batches of an update, which adds up the time until they come."""

    def __next__(self) -> Any:
        global _seconds
        start = time.perf_counter()
        try:
            return super().__next__()
        finally:
            _seconds += time.perf_counter() - start


def take_seconds() -> float:
    """The seconds since the last call."""
    global _seconds
    taken, _seconds = _seconds, 0.0
    return taken
