"""Running the steps' commands: shown before they run, their output kept in a file."""

from __future__ import annotations

import collections
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[2]
"""Commands run here: `--user-dir evomoe_plugin` is then the clone's."""

LINE = 100
TAIL = 15
MAX_THREADS = 4
_POLL_SECONDS = 0.1


class Refused(Exception):
    """The quickstart cannot begin or go on: one line with the reason and the remedy."""


class StepFailed(Exception):
    """A command failed: the end of its log, what it was, and where all of the log is."""

    def __init__(self, command: list[str], log: Path, how: str):
        with open(log, errors="replace") as lines:
            end = "".join(collections.deque(lines, TAIL)).rstrip()
        super().__init__(f"{end}\n\nerror: {Path(command[0]).name} {how}; its whole log is "
                         f"{shown(log)}")


def program(name: str) -> str:
    """The path of a command of the environment that runs us."""
    beside = str(Path(sys.executable).parent)
    found = shutil.which(name, path=os.pathsep.join([beside, os.environ.get("PATH", "")]))
    if found is None:
        raise Refused(f"{name} is not in {beside}; `make venv` installs it")
    return shown(found)


def shown(path: str | Path) -> str:
    """`path` as the commands take it: from `ROOT` if it lies there."""
    path = Path(os.path.abspath(path))
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def run(
    command: list[str],
    log: Path,
    on_line: Callable[[str], None] = lambda line: None,
    *,
    show: str | None = None,
    append: bool = False,
    keep_open: int | None = None,
) -> None:
    """Run a command in `ROOT` until it ends, its output going to `log`.

    Args:
        command: the program and its arguments.
        log: the file; begun anew unless `append`.
        on_line: told each line as it comes.
        show: what is shown in place of the command.
        keep_open: a file descriptor that the command inherits.
    Raises:
        StepFailed: it ended with another status than 0.
        KeyboardInterrupt: ours; the command was interrupted too, and has ended.
    """
    threads = _threads()
    setting = "".join(f"{name}={value} " for name, value in threads.items())
    print(f"\n  $ {setting}{show or _wrapped(command)}\n", flush=True)
    with open(log, "a" if append else "w") as output, open(log) as lines:
        lines.seek(0, os.SEEK_END)
        # In a session of its own, so that Ctrl-C reaches it once, through us.
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True, pass_fds=[] if keep_open is None else [keep_open],
            env={"PYTHONWARNINGS": "ignore", **threads, **os.environ},
        )
        try:
            for line in _follow(lines, process):
                on_line(line)
        except BaseException:
            _interrupt(process)
            raise
    if process.returncode != 0:
        raise StepFailed(command, log, f"failed (status {process.returncode})")


def _threads() -> dict[str, str]:
    """A limit where torch would take more threads than such a small model has work for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if "OMP_NUM_THREADS" in os.environ or (cores or 1) <= MAX_THREADS:
        return {}
    return {"OMP_NUM_THREADS": str(MAX_THREADS)}


def _follow(lines: IO[str], process: subprocess.Popen) -> Iterator[str]:
    """The lines of a file that the process writes, until it ends."""
    line = ""
    while True:
        running = process.poll() is None  # asked first, so that the last lines are seen
        for part in lines:
            line += part
            if line.endswith("\n"):
                yield line
                line = ""
        if not running:
            return
        time.sleep(_POLL_SECONDS)


def _interrupt(process: subprocess.Popen) -> None:
    """End the process as Ctrl-C does, so that it finishes what it writes; kill it the next time."""
    try:
        process.send_signal(signal.SIGINT)
        process.wait()
    except KeyboardInterrupt:
        process.kill()
        process.wait()


def _wrapped(command: list[str]) -> str:
    """The command in lines that a shell takes, broken before options."""
    words = [shlex.quote(word) for word in command]
    lines, line = [], words[0]
    for i, word in enumerate(words[1:], start=1):
        value = words[i + 1] if word.startswith("--") and i + 1 < len(words) else ""
        room = len(line) + 1 + len(word) + (0 if value.startswith("--") else 1 + len(value))
        if room > LINE - 8 and word.startswith("--"):
            lines.append(line)
            line = word
        else:
            line += " " + word
    return " \\\n      ".join([*lines, line])
