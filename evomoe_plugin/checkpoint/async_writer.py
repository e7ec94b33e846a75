"""Write checkpoints in a background thread, without losing errors."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

logger = logging.getLogger(__name__)

_executor: ThreadPoolExecutor | None = None
_pending: Future | None = None


def submit(job: Callable[[], Any]) -> None:
    """Run `job` in the background; one at a time, so call `wait` first."""
    global _executor, _pending
    assert _pending is None, "wait() for the previous write first"
    if _executor is None:
        _executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
    _pending = _executor.submit(job)


def wait() -> None:
    """Wait for the job in the background; raises what it raised."""
    global _pending
    job, _pending = _pending, None
    if job is not None:
        job.result()


@contextlib.contextmanager
def finished_on_exit() -> Iterator[None]:
    """Wait at the end of the block, whether it ends well or not.

    An error of the block itself is the one that is raised: that of the write is logged.
    """
    try:
        yield
    except BaseException:
        try:
            wait()
        except Exception as error:
            logger.error("the checkpoint in the background was not written: %s", error)
        raise
    wait()
