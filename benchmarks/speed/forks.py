"""Work in a process of its own, which costs no imports.

What filled memory once slows whoever comes next, and one that is killed for its memory takes
nothing else with it. The parent may have used neither several threads nor CUDA, which do not
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
    """What `work`, done in a fork, returns, by way of JSON; {"failed": why} where it failed."""
    sys.stdout.flush()
    sys.stderr.flush()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reading)
            with os.fdopen(writing, "w") as answer:
                try:
                    json.dump(work(), answer)
                except Exception as error:
                    traceback.print_exc()
                    json.dump({"failed": reason(error)}, answer)
            status = 0
        except BaseException:  # Ctrl-C, which the parent gets too
            pass
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as answer:
        text = answer.read()
    _, status = os.waitpid(child, 0)
    if status:
        name = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else "an error"
        return {"failed": f"its process ended by {name}"}
    return json.loads(text)


def reason(error: Exception) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
