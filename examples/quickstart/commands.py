"""Run the commands of the steps: print each command, and write its output to a file."""

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
"""Working directory of commands, so that `--user-dir evomoe_plugin` is the clone's."""

LINE = 100
TAIL = 15
MAX_THREADS = 4
_POLL_SECONDS = 0.1


class Refused(Exception):
    """The quickstart cannot start or continue: one line with reason and remedy."""


class StepFailed(Exception):
    """A command failed: the end of its log, the command, and the path of the log."""

    def __init__(self, command: list[str], log: Path, how: str):
        with open(log, errors="replace") as lines:
            end = "".join(collections.deque(lines, TAIL)).rstrip()
        super().__init__(
            f"{end}\n\nerror: {Path(command[0]).name} {how}; its full log is {shown(log)}"
        )


def program(name: str) -> str:
    """The path of a command of the running environment."""
    folder = str(Path(sys.executable).parent)
    found = shutil.which(name, path=os.pathsep.join([folder, os.environ.get("PATH", "")]))
    if found is None:
        raise Refused(f"{name} is not in {folder}; `make venv` installs it")
    return shown(found)


def shown(path: str | Path) -> str:
    """`path` for a command line: relative to `ROOT` if it is inside."""
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
    """Run a command in `ROOT`, with output to `log`.

    Args:
        command: the program and its arguments.
        log: the file; overwritten unless `append`.
        on_line: called with each line of output.
        show: printed instead of the command.
        keep_open: a file descriptor that the command inherits.
    Raises:
        StepFailed: it ended with a status other than 0.
        KeyboardInterrupt: Ctrl-C; the command was interrupted too, and has ended.
    """
    threads = _threads()
    setting = "".join(f"{name}={value} " for name, value in threads.items())
    print(f"\n  $ {setting}{show or _wrapped(command)}\n", flush=True)
    with open(log, "a" if append else "w") as output, open(log) as lines:
        lines.seek(0, os.SEEK_END)
        # In a separate session, so that Ctrl-C reaches it only once, through this process.
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=[] if keep_open is None else [keep_open],
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
    """Limit torch's threads to what such a small model can use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if "OMP_NUM_THREADS" in os.environ or (cores or 1) <= MAX_THREADS:
        return {}
    return {"OMP_NUM_THREADS": str(MAX_THREADS)}


def _follow(lines: IO[str], process: subprocess.Popen) -> Iterator[str]:
    """Yield the lines that the process writes to a file, until it ends."""
    line = ""
    while True:
        running = process.poll() is None  # checked first, to read the last lines
        for part in lines:
            line += part
            if line.endswith("\n"):
                yield line
                line = ""
        if not running:
            return
        time.sleep(_POLL_SECONDS)


def _interrupt(process: subprocess.Popen) -> None:
    """Interrupt the process as Ctrl-C does, so that it can finish; kill it on a second Ctrl-C."""
    try:
        process.send_signal(signal.SIGINT)
        process.wait()
    except KeyboardInterrupt:
        process.kill()
        process.wait()


def _wrapped(command: list[str]) -> str:
    """The command as shell lines, broken before options."""
    words = [shlex.quote(word) for word in command]
    lines, line = [], words[0]
    for i, word in enumerate(words[1:], start=1):
        value = words[i + 1] if word.startswith("--") and i + 1 < len(words) else ""
        length = len(line) + 1 + len(word) + (0 if value.startswith("--") else 1 + len(value))
        if length > LINE - 8 and word.startswith("--"):
            lines.append(line)
            line = word
        else:
            line += " " + word
    return " \\\n      ".join([*lines, line])
