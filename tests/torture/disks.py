"""Disks that are full, over quota, read-only, broken or slow, from any operation on.

The run says so in one line and keeps the last good checkpoint, or goes on where nothing is lost;
with the disk well again, the same command goes on to the unbroken run's files, bit for bit.
"""

from __future__ import annotations

import errno
import random
import re
from collections.abc import Iterable
from pathlib import Path

from tests.torture import faults, forked, kills, tiny
from tests.torture.harness import Outcome, folder_of

NAME, TITLE, CASES, DRAW = "disks", "Faulty disks", 200, 2

_ALL: tuple[str, ...] = ()
_BROKEN = {
    "full": (errno.ENOSPC, ("write", "open", "link", "symlink", "mkdir", "fsync"), True),
    "over quota": (errno.EDQUOT, ("write", "open", "mkdir"), True),
    "read-only": (errno.EROFS, _ALL, True),
    "error on write": (errno.EIO, ("write",), False),
    "error on fsync": (errno.EIO, ("fsync",), False),
    "error on rename": (errno.EIO, ("replace", "rename"), False),
    "full for a moment": (errno.ENOSPC, ("write",), False),
}
KINDS = (*_BROKEN, "slow")
SLOW_SECONDS = 0.02


def smoke() -> Iterable[int]:
    """A failing rename, of one process."""
    return (5 * len(kills.LAYOUTS),)


def prepare(work: Path) -> None:
    kills.prepare(work)


def case(seed: int, work: Path) -> Outcome:
    dice = random.Random(seed)
    layout = kills.LAYOUTS[seed % len(kills.LAYOUTS)]
    kind = KINDS[seed // len(kills.LAYOUTS) % len(KINDS)]
    counts = kills.moments(work, layout)["disk"]
    rank = dice.choice([rank for rank, count in enumerate(counts) if count])
    folder = folder_of(NAME, seed, work) / "run"
    if kind == "slow":
        fault: faults.Slow | faults.Error = faults.Slow(SLOW_SECONDS, rank)
    else:
        number, operations, lasting = _BROKEN[kind]
        at = 1 + dice.randrange(counts[rank])
        fault = faults.Error(at, rank, number, operations, lasting)
    trained = kills.train(work, layout, folder)

    def run() -> None:
        faults.watch_disk(folder, fault, faults.Counters())
        trained()

    ended = forked.call(run, kills.LIMIT_SECONDS)
    label = f"{kind}, {layout}: {_came_of(fault, ended)}"
    problem = verdict(ended)
    if not problem:
        wanted = tiny.unbroken(work, layout)
        problem = kills.broken_file(folder, wanted) or kills.too_much(folder, wanted)
    if problem:
        return Outcome(label, problem)
    return kills.after(label, kills.resumed(work, layout, folder), layout)


def _came_of(fault: faults.Slow | faults.Error, ended: forked.Ended) -> str:
    if isinstance(fault, faults.Error) and not any(fault.struck.values()):
        return "not struck"
    return "went on" if ended.status == 0 else "ended in one line"


def verdict(ended: forked.Ended) -> str:
    """What is wrong with how a command ended; empty: it succeeded, or failed in one line."""
    if ended.timed_out:
        return "it hangs"
    if ended.status < 0:
        return f"it was ended by signal {-ended.status}"
    if "Traceback (most" in ended.output:
        return f"a traceback, which ends with: {last_of_traceback(ended.lines)}"
    if ended.status != 0 and not ended.error:
        return f"it ended with {ended.status}, and no line that says why: {ended.tail}"
    return ""


def last_of_traceback(lines: list[str]) -> str:
    """The error that a traceback ends with."""
    begun = False
    for line in lines:
        line = re.sub(r"^\[rank\d+\]: ?", "", line)  # which torch's hook for exceptions adds
        if line.startswith("Traceback (most"):
            begun = True
        elif begun and line[:1] not in " |^~":
            return line[:300]
    return ""
