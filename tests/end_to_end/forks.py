"""Commands in processes of their own that do not begin by importing for seconds."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.rank_server import new_context


class Forked:
    """`python -m fairseq_cli.COMMAND`, of `COMMANDS`, as a `subprocess.Popen`; its output and
    errors go to one file, and it leads a process group of its own."""

    def __init__(
        self, command: str, arguments: list[str], cwd: Path, environment: dict[str, str], log: Path
    ):
        self.args = [command, *arguments]
        self._log = Path(log)
        self._log.touch()
        given = (command, arguments, str(cwd), environment, str(log))
        self._process = new_context().Process(target=_command, args=given)
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """Negative: the signal that ended it."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout, self.output())
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it printed until its end, twice: as output and as errors."""
        self.wait(timeout)
        return self.output(), self.output()

    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Also what it started."""
        if self.returncode is None:
            os.killpg(self.pid, signal.SIGKILL)


def run(
    command: str, arguments: list[str], cwd: Path, environment: dict[str, str], timeout: float
) -> subprocess.CompletedProcess:
    """A `Forked` command to its end.

    Raises:
        subprocess.TimeoutExpired: it has been killed.
    """
    with tempfile.NamedTemporaryFile() as log:
        process = Forked(command, arguments, cwd, environment, Path(log.name))
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        return subprocess.CompletedProcess(process.args, status, process.output())


def _command(command, arguments, cwd, environment, output) -> None:
    status = 1
    try:
        os.setsid()
        to = os.open(output, os.O_WRONLY | os.O_APPEND)
        os.dup2(to, 1)
        os.dup2(to, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(environment)
        multiprocessing.set_start_method("fork", force=True)  # that of a new process
        sys.modules["evomoe_plugin.launch.ranks"].new_context = multiprocessing.get_context
        sys.argv = [f"fairseq_cli/{command}.py", *arguments]
        sys.modules["__main__"] = sys.modules[f"fairseq_cli.{command}"]
        sys.modules["__main__"].cli_main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
