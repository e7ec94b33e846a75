"""Cases by seed, and their outcomes in files from which a killed campaign goes on.

A part of the campaign is a module with

    NAME, TITLE     the part's name on the command line, and in reports
    CASES           how many cases the campaign asks for; seeds count from 0
    DRAW            a number that changes when a seed comes to mean another case
    prepare(work)   make what its cases share, in a folder; in a process that never trains
    case(seed, work)    run one and judge it
    smoke()         the seeds of a few cases of a few seconds in total

An outcome file has a line for each session, with commit, DRAW and machine, and one for each case
since then. The last line of a seed counts; one that failed before was mended in between.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Outcome:
    """Of a case.

    Attributes:
        kind: what happened, in a few words, the same for cases that ended alike.
        fault: what should not have; empty: nothing.
    """

    kind: str
    fault: str = ""


class Part(Protocol):
    """A module of the campaign, see above."""

    NAME: str
    TITLE: str
    CASES: int
    DRAW: int

    def prepare(self, work: Path) -> None: ...

    def case(self, seed: int, work: Path) -> Outcome: ...

    def smoke(self) -> Iterable[int]: ...


@dataclass(frozen=True)
class Session:
    """What the cases of one session ran on."""

    commit: str
    draw: int
    machine: str


@dataclass
class History:
    """What is known of a part's cases.

    Attributes:
        last: by seed, the last outcome.
        failed: seeds that failed at least once.
        sessions: those that ran a case, in order.
        seconds: wall-clock time of all cases together.
    """

    last: dict[int, Outcome]
    failed: set[int]
    sessions: list[Session]
    seconds: float

    @property
    def left(self) -> list[int]:
        """Seeds whose last outcome is a failure."""
        return sorted(seed for seed, outcome in self.last.items() if outcome.fault)

    @property
    def mended(self) -> list[int]:
        """Seeds that failed, and then did not."""
        return sorted(self.failed.difference(self.left))


def read(part: Part, results: Path) -> History:
    """The outcomes of a part so far; those of another DRAW count no more."""
    history = History({}, set(), [], 0.0)
    session = None
    for line in _lines(results / f"{part.NAME}.jsonl"):
        if "commit" in line:
            session = Session(line["commit"], line["draw"], line["machine"])
            continue
        if session is None or session.draw != part.DRAW:
            continue
        if not history.sessions or history.sessions[-1] != session:
            history.sessions.append(session)
        outcome = Outcome(line["kind"], line.get("fault", ""))
        history.last[line["seed"]] = outcome
        history.seconds += line["s"]
        if outcome.fault:
            history.failed.add(line["seed"])
    return history


def _lines(path: Path) -> Iterator[dict]:
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:  # the session was killed while it wrote the last one
                continue


def run(
    part: Part, seeds: Sequence[int], work: Path, results: Path | None, end: float
) -> Iterator[tuple[int, Outcome]]:
    """Run cases until all are done or the time is `end`; each outcome is written at once.

    Args:
        work: a folder for temporary files, and for what cases share.
        results: where outcomes are kept; None: nowhere.
        end: of `time.monotonic`.
    """
    if not seeds:
        return
    part.prepare(work)
    file = None
    if results is not None:
        results.mkdir(parents=True, exist_ok=True)
        file = open(results / f"{part.NAME}.jsonl", "a")
        _write(file, {"commit": commit(), "draw": part.DRAW, "machine": machine()})
    for seed in seeds:
        if time.monotonic() > end:
            break
        began = time.monotonic()
        outcome = judged(part, seed, work)
        if file is not None:
            line = {"seed": seed, "kind": outcome.kind}
            if outcome.fault:
                line["fault"] = outcome.fault[:400]
            _write(file, {**line, "s": round(time.monotonic() - began, 1)})
        yield seed, outcome
    if file is not None:
        file.close()


def judged(part: Part, seed: int, work: Path) -> Outcome:
    """One case, in a folder of its own; what the part itself raises is a failure too."""
    folder = work / "cases" / f"{part.NAME}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        return part.case(seed, work)
    except Exception as error:
        return Outcome("the case raised", f"{type(error).__name__}: {error}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def folder_of(part: str, seed: int, work: Path) -> Path:
    """The folder of a case, which is empty when it begins."""
    return work / "cases" / f"{part}-{seed}"


def repeated_by(part: Part, seed: int) -> str:
    """The command that runs one case again."""
    return f'make torture ARGS="--part {part.NAME} --case {seed}"'


def commit() -> str:
    """Of the clone; with `+` where files of the package differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip()

    changed = git("status", "--porcelain", "--", "evomoe_plugin")
    return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")


def machine() -> str:
    """Processor and cores."""
    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    return f"{name}, {os.cpu_count()} cores"


def _write(file, line: dict) -> None:
    file.write(json.dumps(line) + "\n")
    file.flush()
