"""Run functions in forked children: no start of Python, no imports, and nothing that they break
outlives them.

The parent has imported torch and fairseq and started no thread. A child leads a process group of
its own, so that what it started ends with it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import multiprocessing
import os
import pickle
import resource
import signal
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

# Exit statuses of shells: killed by SIGKILL. Here: the time was up.
TIMED_OUT = 137


@dataclass
class Ended:
    """A child that has ended.

    Attributes:
        status: exit status; negative: the signal that ended it; `TIMED_OUT`.
        output: standard output and error together.
        value: what the function returned; None if it did not return.
    """

    status: int
    output: str
    value: Any = None

    @property
    def timed_out(self) -> bool:
        return self.status == TIMED_OUT

    @property
    def lines(self) -> list[str]:
        """Lines of the output that are not empty."""
        return [line for line in self.output.splitlines() if line.strip()]

    @property
    def error(self) -> str:
        """The last line that begins with `error:`; empty if there is none."""
        found = [line for line in self.lines if "error: " in line]
        return found[-1][-500:] if found else ""

    @property
    def tail(self) -> str:
        """What explains a failure: the last error of a traceback, or the last line."""
        return self.lines[-1][-300:] if self.lines else ""


class Child:
    """A function that runs in a forked child."""

    def __init__(self, function: Callable[[], Any], memory: int | None = None):
        """
        Args:
            memory: most bytes of address space that the child may use beyond this process's.
        """
        self._output = tempfile.TemporaryFile()
        self._value = tempfile.TemporaryFile()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _run(function, self._output.fileno(), self._value, memory)
        self._status: int | None = None

    def output(self) -> str:
        """What it has printed until now."""
        size = os.fstat(self._output.fileno()).st_size
        return os.pread(self._output.fileno(), size, 0).decode(errors="replace")

    def poll(self) -> bool:
        """Whether it has ended."""
        if self._status is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status is not None

    def kill(self, to: int = signal.SIGKILL) -> None:
        """Send a signal to it and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, to)

    def wait(self, timeout: float) -> Ended:
        """Its end; after `timeout` seconds it is killed."""
        end, pause = time.monotonic() + timeout, 0.002
        timed_out = False
        while not self.poll():
            if time.monotonic() > end:
                timed_out = True
                self.kill()
                self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
                break
            time.sleep(pause)
            pause = min(1.5 * pause, 0.05)
        self.kill()  # what it left behind
        self._value.seek(0)
        content = self._value.read()
        ended = Ended(
            TIMED_OUT if timed_out else self._status,
            self.output(),
            pickle.loads(content) if content else None,
        )
        self._output.close()
        self._value.close()
        return ended


def call(function: Callable[[], Any], timeout: float = 60, memory: int | None = None) -> Ended:
    """Run `function` in a child until it ends."""
    return Child(function, memory).wait(timeout)


def _run(function: Callable[[], Any], output: int, value: Any, memory: int | None) -> None:
    status = 1
    try:
        os.setsid()
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
        if memory is not None:
            used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
        returned = function()
        value.write(pickle.dumps(returned))
        value.flush()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def command(name: str, arguments: Sequence[object]) -> None:
    """`fairseq-NAME ARGUMENTS`, in this process; its ranks are forked too."""
    module = sys.modules[f"fairseq_cli.{name}"]
    sys.argv = [f"fairseq_cli/{name}.py", *map(str, arguments)]
    sys.modules["__main__"] = module
    with forked_ranks():
        module.cli_main()


@contextlib.contextmanager
def forked_ranks() -> Iterator[None]:
    """Inside, ranks are forked instead of started anew, which would take seconds for imports."""
    from evomoe_plugin.launch import ranks

    before = ranks.new_context
    ranks.new_context = lambda: multiprocessing.get_context("fork")
    try:
        yield
    finally:
        ranks.new_context = before


def configuration(name: str, arguments: Sequence[object]) -> Any:
    """What `fairseq-NAME ARGUMENTS` makes of its options, which takes most of a tiny run's time."""
    from fairseq import options
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    parsers = {
        "train": options.get_training_parser,
        "eval_lm": options.get_eval_lm_parser,
        "validate": options.get_validation_parser,
    }
    parsed = options.parse_args_and_arch(parsers[name](), [str(a) for a in arguments])
    return convert_namespace_to_omegaconf(parsed)


def remember_parsing() -> None:
    """Let hydra parse a text that it takes for an option once, and not copy its repository, which
    would keep what it read: half of the time of `configuration`."""
    from hydra._internal import config_repository
    from hydra.core.override_parser.overrides_parser import OverridesParser

    config_repository.copy = types.SimpleNamespace(deepcopy=lambda delegate: delegate)
    parse, parsed = OverridesParser.parse_rule, {}

    @functools.wraps(parse)
    def parse_rule(self: Any, text: str, rule: str) -> Any:
        if (text, rule) not in parsed:
            parsed[text, rule] = parse(self, text, rule)
        return parsed[text, rule]

    OverridesParser.parse_rule = parse_rule


def start(name: str, cfg: Any) -> Any:
    """Run a command with its options, in this process; what its main returns, of one rank."""
    from fairseq.distributed import utils as distributed_utils

    module = sys.modules[f"fairseq_cli.{name}"]
    sys.modules["__main__"] = module
    returned = []

    def main(*args: Any, **kwargs: Any) -> None:
        returned.append(module.main(*args, **kwargs))

    # Where the launcher puts its trainer and its loop of evaluation.
    main = types.FunctionType(main.__code__, vars(module), "main", None, main.__closure__)
    main.__module__ = module.__name__
    with forked_ranks():
        distributed_utils.call_main(copy.deepcopy(cfg), main)
    return returned[0] if returned else None
