"""Supervise the ranks of a run on this machine: start, watch and end them together.

torch's own `spawn` names the first process that it finds dead, which after a crash is as likely
a rank that lost its peer as the one that failed. Here each rank reports its error before it
dies, and the first report counts.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection, resource_tracker
from typing import Any

import torch.multiprocessing
from fairseq.distributed import utils as distributed_utils

import evomoe_plugin
from evomoe_plugin.config.errors import FAILED, RunFailed, exit_status

logger = logging.getLogger(__name__)

# Seconds a rank gets to finish what it writes before it is ended, and before it is killed.
GRACE = 10.0


def new_context() -> Any:
    """How ranks are started: afresh, since what torch and CUDA hold does not survive a fork."""
    return torch.multiprocessing.get_context("spawn")


def run_ranks(main: Callable, cfg: Any, kwargs: dict, count: int, threads: int | None) -> None:
    """Run `main(cfg, **kwargs)` on `count` ranks; return when all have succeeded.

    Args:
        threads: OMP_NUM_THREADS of each rank, where the environment has none; None leaves it.

    Raises:
        OptionError, RunFailed: as raised by a rank, or for a rank that died.
    """
    _start_resource_tracker()
    context = new_context()
    reports = context.SimpleQueue()
    ranks = [
        context.Process(target=_rank, args=(i, main, cfg, kwargs, reports)) for i in range(count)
    ]
    # Ranks that outlive this process would train on unseen: end them first.
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        if threads is not None:
            os.environ["OMP_NUM_THREADS"] = str(threads)
        for rank in ranks:
            rank.start()
        running: dict[Any, Any] = {rank.sentinel: rank for rank in ranks}
        while running:
            for sentinel in connection.wait(list(running)):
                running.pop(sentinel).join()
            if any(rank.exitcode for rank in ranks):
                raise _first_failure(ranks, reports)
    except KeyboardInterrupt:
        for rank in ranks:
            if rank.is_alive() and rank.pid:
                os.kill(rank.pid, signal.SIGINT)
        raise
    finally:
        if threads is not None:
            os.environ.pop("OMP_NUM_THREADS", None)
        _end(ranks)
        signal.signal(signal.SIGTERM, previous)


def _start_resource_tracker() -> None:
    """Start multiprocessing's process that removes semaphores, and have it not warn of them.

    Those of workers that load data are left to it, as their rank ends them. fairseq hides the
    warning by the name that it had before Python 3.8.
    """
    before = os.environ.get("PYTHONWARNINGS")
    hidden = "ignore:resource_tracker:UserWarning"
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, (before, hidden)))
    try:
        resource_tracker.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONWARNINGS"]
        else:
            os.environ["PYTHONWARNINGS"] = before


def _rank(i: int, main: Callable, cfg: Any, kwargs: dict, reports: Any) -> None:
    # Background jobs of a shell ignore SIGINT, by which a rank learns that its parent died.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(torch.multiprocessing, "_prctl_pr_set_pdeathsig"):  # Linux: die with the parent
        torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGINT)
    evomoe_plugin.register()  # a program may import this package before fairseq
    start = cfg.distributed_training.distributed_rank or kwargs.get("start_rank", 0)
    try:
        distributed_utils.distributed_main(i, main, cfg, kwargs)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BaseException as error:
        status, story = exit_status(error), None
        if status is None:
            story = traceback.format_exc()
            error = RunFailed(
                f"rank {start + i} stopped with {type(error).__name__}: {error}".split("\n")[0]
            )
        reports.put((error, story))
        # The peers notice our end by their broken connections: let the report arrive first.
        time.sleep(0.2)
        os._exit(status or FAILED)


def _first_failure(ranks: list, reports: Any) -> BaseException:
    for i, rank in enumerate(ranks):
        if (rank.exitcode or 0) < 0:
            name = signal.Signals(-rank.exitcode).name
            hint = " (out of memory?)" if name == "SIGKILL" else ""
            return RunFailed(
                f"rank {i} was ended by {name}{hint}; the other ranks were stopped, "
                "the last checkpoint, if any, is intact"
            )
    if any(rank.exitcode == 128 + signal.SIGINT for rank in ranks):
        return KeyboardInterrupt()
    if reports.empty():
        return RunFailed(
            "a rank ended without a report: "
            + ", ".join(
                f"rank {i} with status {rank.exitcode}"
                for i, rank in enumerate(ranks)
                if rank.exitcode
            )
        )
    error, story = reports.get()
    if story:
        print(story, file=sys.stderr)
    return error


def _end(ranks: list) -> None:
    """End the ranks that still run; after a failure at once, since they wait for the failed one."""
    started = [rank for rank in ranks if rank.pid is not None]
    if isinstance(sys.exception(), KeyboardInterrupt):
        for rank in started:
            rank.join(GRACE)
    for rank in started:
        rank.terminate()
    for rank in started:
        rank.join(GRACE)
        rank.kill()
        rank.join()
