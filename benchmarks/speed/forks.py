"""Run work in a fork, without importing modules again.

Memory use of one measurement then does not slow the next one, and one that is killed for its memory
does not end the others. The parent must have used neither several threads nor CUDA, which do not
survive a fork.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any


def forked(work: Callable[[], Any]) -> Any:
    """Run `work` in a fork and return its result via JSON; {"failed": reason} if it fails."""
    sys.stdout.flush()
    sys.stderr.flush()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reading)
            with os.fdopen(writing, "w") as pipe:
                try:
                    json.dump(work(), pipe)
                except Exception as error:
                    traceback.print_exc()
                    json.dump({"failed": reason(error)}, pipe)
            status = 0
        except BaseException:  # Ctrl-C, also sent to the parent
            pass
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if status:
        name = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else "an error"
        return {"failed": f"its process ended by {name}"}
    return json.loads(text)


def reason(error: Exception) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
