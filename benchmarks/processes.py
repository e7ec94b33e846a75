"""Run work in a separate process; return its output and time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""Working directory of commands, so that `--user-dir evomoe_plugin` is the clone's."""


@dataclass(frozen=True)
class Ended:
    """Finished work."""

    output: str
    """Its output."""
    wall_seconds: float
    cpu_seconds: float
    """User plus system time."""


def call(command: list[str]) -> str:
    """Run a command and return its output.

    Raises:
        SystemExit: it failed; with the end of its output.
    """
    ended = subprocess.run(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if ended.returncode:
        sys.exit(f"{ended.stdout[-3000:]}\nerror: {' '.join(command[:4])} … failed")
    return ended.stdout


def fork(work: Callable[[], object], log: Path) -> Ended:
    """Run `work` in a fork, without importing modules again.

    This process must not have used several threads before: thread pools do not survive a fork.

    Args:
        log: the file for its output.
    Raises:
        SystemExit: it failed; with the end of its output.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    start = time.perf_counter()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with open(log, "w") as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            os.chdir(ROOT)
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    _, status, used = os.wait4(child, 0)
    wall_seconds = time.perf_counter() - start
    output = log.read_text() if log.exists() else ""
    if status:
        sys.exit(f"{output[-3000:]}\nerror: it failed; its full output is in {log}")
    return Ended(output, wall_seconds, used.ru_utime + used.ru_stime)
