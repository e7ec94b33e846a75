"""Commands in processes of their own that do not begin by importing for seconds.

A server that has imported torch and fairseq, and done nothing else, forks for each command, and
this for each rank.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODULES = ("train", "eval_lm", "validate", "generate", "interactive", "hydra_train")


class ForkServer:
    """Runs `python -m fairseq_cli.COMMAND` by fork."""

    def __init__(self, environment: dict[str, str]):
        self._server = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.end_to_end.forks"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self,
        command: str,
        arguments: list[str],
        cwd: Path,
        environment: dict[str, str],
        timeout: float,
    ) -> subprocess.CompletedProcess:
        """The ended command, its output and errors together.

        Raises:
            subprocess.TimeoutExpired: it has been killed.
        """
        with tempfile.NamedTemporaryFile("r", errors="replace") as output:
            request = [command, arguments, str(cwd), environment, timeout, output.name]
            self._server.stdin.write(json.dumps(request) + "\n")
            self._server.stdin.flush()
            status = json.loads(self._server.stdout.readline())
            text = output.read()
        if status is None:
            raise subprocess.TimeoutExpired([command, *arguments], timeout, text)
        return subprocess.CompletedProcess([command, *arguments], status, text)

    def close(self) -> None:
        """End the server."""
        self._server.stdin.close()
        self._server.wait()


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports and commands print is no answer
    for name in MODULES:
        importlib.import_module(f"fairseq_cli.{name}")
    importlib.import_module("evomoe_plugin")
    for name in ("fairscale.nn.data_parallel", "torch._dynamo"):  # by FSDP, by optimizers
        importlib.import_module(name)
    ranks = importlib.import_module("evomoe_plugin.launch.ranks")
    ranks.new_context = lambda: multiprocessing.get_context("fork")
    for line in sys.stdin:
        command, arguments, cwd, environment, timeout, output = json.loads(line)
        child = os.fork()
        if child == 0:
            _command(command, arguments, cwd, environment, output)
        print(json.dumps(_wait(child, timeout)), file=answers, flush=True)


def _wait(child: int, timeout: float) -> int | None:
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


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
        sys.argv = [f"fairseq_cli/{command}.py", *arguments]
        # Ranks begin by importing it, as they do after `python -m`.
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


if __name__ == "__main__":
    _serve()
