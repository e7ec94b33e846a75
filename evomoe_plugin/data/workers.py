"""Worker processes that exit with their work, on Ctrl-C, and with their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as StillRunning
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from evomoe_plugin.config.errors import RunFailed

TICK_SECONDS = 0.1


class Workers:
    """A pool of `count` processes; an error in the `with` block terminates them at once."""

    def __init__(self, count: int, tick: Callable[[], None] = lambda: None):
        """`tick` is called about ten times per second while waiting for results."""
        self._tick = tick
        self._executor = ProcessPoolExecutor(count, initializer=_start)

    def __enter__(self) -> Workers:
        self._not_ours = set(multiprocessing.active_children())
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is not None:
            for process in set(multiprocessing.active_children()) - self._not_ours:
                process.terminate()
        self._executor.shutdown(wait=True, cancel_futures=True)

    def run(self, function: Callable, *arguments: Any) -> Any:
        return self._result(self._executor.submit(function, *arguments))

    def map(self, function: Callable, arguments: Iterable[tuple]) -> Iterator[Any]:
        """The results of `function(*a)` for each `a`, in order."""
        for future in [self._executor.submit(function, *each) for each in arguments]:
            yield self._result(future)

    def _result(self, future: Future) -> Any:
        while True:
            try:
                return future.result(timeout=TICK_SECONDS)
            except StillRunning:
                if future.done():  # the work itself raised a TimeoutError
                    raise
                self._tick()
            except BrokenProcessPool:
                raise RunFailed(
                    "a worker process was killed, possibly for lack of memory; reduce --workers"
                ) from None


def _start() -> None:
    # The parent also gets Ctrl-C, and terminates its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A killed parent does not close its queue: workers would wait forever.
    if parent := multiprocessing.parent_process():
        parent.join()
    os._exit(1)
