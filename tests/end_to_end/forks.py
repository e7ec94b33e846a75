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


def run(
    command: str, arguments: list[str], cwd: Path, environment: dict[str, str], timeout: float
) -> subprocess.CompletedProcess:
    """`python -m fairseq_cli.COMMAND`, of `COMMANDS`, to its end; output and errors together.

    Raises:
        subprocess.TimeoutExpired: it has been killed.
    """
    words = [command, *arguments]
    with tempfile.NamedTemporaryFile("r", errors="replace") as output:
        given = (command, arguments, cwd, environment, output.name)
        process = new_context().Process(target=_command, args=given)
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
            raise subprocess.TimeoutExpired(words, timeout, output.read())
        return subprocess.CompletedProcess(words, process.exitcode, output.read())


def _command(command, arguments, cwd, environment, output) -> None:
    status = 1
    try:
        os.setsid()
        to = os.open(output, os.O_WRONLY | os.O_TRUNC)
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
