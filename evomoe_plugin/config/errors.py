"""Errors that end a run in one line for the user, with an exit status."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from types import TracebackType
from typing import Any

FAILED = 1
INTERRUPTED = 130


class OptionError(ValueError):
    """An option has an invalid value: one line with option, value and remedy."""

    exit_status = 2

    def __init__(self, option: str, value: Any, remedy: str):
        flag = "--" + option.replace("_", "-") if re.fullmatch(r"[a-z0-9_]+", option) else option
        super().__init__(f"{flag} {value}: {remedy}")
        self.arguments = (option, value, remedy)

    def __reduce__(self):  # crosses process boundaries when a spawned rank raises it
        return type(self), self.arguments


class RunFailed(RuntimeError):
    """The run cannot continue, for a reason that one line explains (a full disk, a dead rank)."""

    exit_status = FAILED


def exit_status(error: BaseException) -> int | None:
    """The exit status of an error whose message suffices for the user, else None."""
    return getattr(error, "exit_status", None)


def install_excepthook() -> None:
    """Print `OptionError` and `RunFailed` in one line in programs that do not catch them."""
    before = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, (OptionError, RunFailed)):
            print(f"error: {error}", file=sys.stderr)
        else:
            before(kind, error, trace)

    sys.excepthook = show


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Print `OptionError` and `RunFailed` as `error: …`, and exit with their status."""
    try:
        yield
    except (OptionError, RunFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(exit_status(error))
    except KeyboardInterrupt:
        print(
            "interrupted: a run with the same --save-dir resumes from its last checkpoint, if any",
            file=sys.stderr,
        )
        sys.exit(INTERRUPTED)
