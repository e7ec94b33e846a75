"""Train the declared runs (README.md), two at a time.

Finished runs are files in the folder of results and are not trained again; others go on from their
last checkpoint, however they ended.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "examples/quickstart"))

from processes import ROOT

from study import report, results, texts
from study.attempt import Attempt, Locked, RunFolder
from study.miniature import MASKED_LM, TRANSLATION
from study.runs import Run, families_of, ready, undecided
from study.systems import SMOKE, STUDY, Study

SECONDS_PER_UPDATE = 0.18
"""One thread, before anything is measured."""
_POLL_SECONDS = 0.25
STUDIES = {study.name or "routing": study for study in (STUDY, MASKED_LM, TRANSLATION)}
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


class Queue:
    """The runs that are left, in order, and those being trained."""

    def __init__(self, study: Study, work: Path, folder: Path, only: list[str], given: list[str]):
        """
        Args:
            folder: of results.
            only: names of the systems to train; empty: all.
            given: texts to train on; empty: all.
        """
        self.study, self.work, self.results = study, work, folder
        self._only = set(only or (system.name for system in study.systems))
        self._texts = set(given or study.texts)
        self.failed: dict[Run, str] = {}
        self._data: dict[str, tuple[Path, str]] = {}

    def declared(self) -> list[Run]:
        """Runs whose learning rate is known, and which were asked for or choose that rate."""
        families = families_of(self.study, self._only)
        grid = results.grid_perplexities(self.study, self.results)
        return [run for run in ready(self.study, grid) if self._wanted(run, families)]

    def _wanted(self, run: Run, families: set[str]) -> bool:
        if run.system.name in self._only and run.text in self._texts:
            return True
        return (
            run.system.family in families
            and run.system.name == self.study.representatives[run.system.family]
            and run.text == self.study.grid_text
            and run.seed == 1
        )

    def left(self) -> list[Run]:
        """Declared runs without a result that did not fail in this call."""
        return [
            run
            for run in self.declared()
            if run not in self.failed and results.current(run, self.study, self.results) is None
        ]

    def work_off(self, jobs: int, hours: float) -> None:
        """Train what is left, `jobs` at a time; start none after `hours`."""
        end = time.monotonic() + 3600 * hours
        running: list[Attempt] = []
        for text in sorted(self._texts | {self.study.grid_text}):
            self._prepared(text)
        try:
            while True:
                waiting = []
                if len(running) < jobs and time.monotonic() < end:
                    busy = {attempt.run for attempt in running}
                    waiting = [run for run in self.left() if run not in busy]
                    for run in waiting[:]:
                        if len(running) == jobs:
                            break
                        attempt = self._start(run)
                        if attempt is not None:
                            running.append(attempt)
                            waiting.remove(run)
                if not running and not waiting:
                    return
                time.sleep(_POLL_SECONDS)
                for attempt in running[:]:
                    status = attempt.poll()
                    if status is not None:
                        running.remove(attempt)
                        self._finish(attempt, status)
        finally:
            for attempt in running:
                attempt.close()

    def _start(self, run: Run) -> Attempt | None:
        try:
            attempt = Attempt(run, self.study, self.work, *self._prepared(run.text))
        except Locked:
            return None
        if attempt.result() is not None:  # the queue was killed before it wrote it
            self._finish(attempt, 0)
            return None
        at = attempt.folder.update()
        say(f"{run.text} {run.name}: " + (f"goes on, was at update {at}" if at else "starts"))
        attempt.start()
        return attempt

    def _finish(self, attempt: Attempt, status: int) -> None:
        run = attempt.run
        result = attempt.result()
        if result is not None:
            result.write(results.path_of(run, self.results))
            attempt.folder.remove_checkpoints()
            ppl = "DIVERGED" if result.diverged else f"test perplexity {result.test_perplexity:.2f}"
            left = len(self.left())
            say(f"{run.text} {run.name}: {ppl}, {result.cpu_seconds:.0f} CPU s; {left} left")
        else:
            reason = f"status {status}" if status else "its log ends early"
            self.failed[run] = reason
            say(f"{run.text} {run.name}: FAILED ({reason}), see {attempt.folder.log}:")
            print(attempt.folder.tail(), flush=True)
        attempt.close()

    def _prepared(self, text: str) -> tuple[Path, str]:
        """The folder of a text, and its fingerprint, which all its results must have."""
        if text not in self._data:
            data = texts.prepare(text, self.work)
            mark = texts.fingerprint(data)
            for path in sorted((self.results / text).glob("*.json")):
                result = results.read(path)
                if result is not None and result.data != mark:
                    sys.exit(
                        f"error: {path}: its text is {result.data}, not {mark}, that of {data} "
                        "(another Python?); give --results a folder of its own"
                    )
            self._data[text] = data, mark
        return self._data[text]

    def overview(self, jobs: int) -> str:
        """What is done, running and left, and for how long."""
        declared = self.declared()
        found = {run: results.current(run, self.study, self.results) for run in declared}
        done = {run: result for run, result in found.items() if result is not None}
        pace: dict[str, list[float]] = {}
        for run, result in done.items():
            pace.setdefault(run.system.name, []).append(result.wall_seconds / result.updates)
        usual = statistics.median(sum(pace.values(), [SECONDS_PER_UPDATE] * (not pace)))
        lines, seconds = [], 0.0
        for run in declared:
            line = f"{run.text:6} {run.name:32} "
            if run in done:
                lines.append(f"{line}done     test perplexity {done[run].test_perplexity:.2f}")
                continue
            folder, updates = RunFolder(run, self.work), run.updates(self.study)
            at = folder.update()
            rate = statistics.median(pace.get(run.system.name, [usual]))
            seconds += rate * (updates - at)
            state = "running" if folder.is_locked() else "left"
            if state == "left" and results.read(results.path_of(run, self.results)) is not None:
                state = "outdated"  # declared anew since
            lines.append(f"{line}{state:8} {f'update {at}' if at else ''}".rstrip())
        grid = results.grid_perplexities(self.study, self.results)
        later = [
            system
            for system, text, _ in undecided(self.study, grid)
            if system.name in self._only and text in self._texts
        ]
        seconds += usual * self.study.updates * sum(system.share for system in later)
        lines.append(
            f"{len(done)} done, {len(declared) - len(done)} left, {len(later)} more once their "
            f"learning rates are chosen; about {seconds / jobs / 3600:.1f} h with {jobs} at a time"
        )
        return "\n".join(lines)


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--study", choices=STUDIES, default="routing", help="which one (default: routing)")
    add("--only", nargs="+", default=[], metavar="SYSTEM", help="these systems (default: all)")
    add("--text", nargs="+", default=[], help="these texts (default: all)")
    add("--jobs", type=int, default=2, help="runs at a time, one thread each (default: 2)")
    add("--hours", type=float, default=float("inf"), help="start no run later than this")
    add("--list", action="store_true", help="show what is done, running and left, and end")
    add(
        "--work",
        type=Path,
        default=CACHE / "evomoe-study",
        help="folder of texts, logs and checkpoints (default: ~/.cache/evomoe-study)",
    )
    add("--results", type=Path, help="folder of results (default: benchmarks/study/results)")
    add("--report", action="store_true", help="write the report of the results so far, and end")
    add("--out", type=Path, help="folder of the report (default: benchmarks/results)")
    add("--smoke", action="store_true", help="two systems, four updates: does the harness work?")
    args = parser.parse_args(argv)
    study = SMOKE if args.smoke else STUDIES[args.study]
    for option, given, known in (
        ("--only", args.only, [system.name for system in study.systems]),
        ("--text", args.text, study.texts),
    ):
        for name in given:
            if name not in known:
                parser.error(f"{option} {name}: give some of {', '.join(known)}")
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: give 1 or more")
    args.work = args.work.absolute() / study.name
    if args.results is None:
        args.results = args.work / "smoke-results" if args.smoke else results.RESULTS / study.name
    if args.out is None:
        args.out = args.work / "smoke-results" if args.smoke else ROOT / "benchmarks/results"
    args.results, args.out = args.results.absolute(), args.out.absolute()
    args.study = study
    return args


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 1 if runs failed, 130 if interrupted."""
    args = parse(argv)
    queue = Queue(args.study, args.work, args.results, args.only, args.text)
    if args.list:
        print(queue.overview(args.jobs))
        return 0
    if args.report:
        print(report.write(args.study, args.results, args.out))
        return 0
    try:
        queue.work_off(args.jobs, args.hours)
    except KeyboardInterrupt:
        say("interrupted; the same command goes on")
        return 130
    for run, reason in queue.failed.items():
        print(f"failed: {run.text} {run.name} ({reason})")
    say(f"{len(queue.left())} runs left")
    return 1 if queue.failed else 0


if __name__ == "__main__":
    sys.exit(main())
