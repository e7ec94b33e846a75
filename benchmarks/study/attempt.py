"""One attempt at a run: a process that trains from the last checkpoint, and what it costs."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import IO, Any

from processes import ROOT

from evomoe_plugin.checkpoint.atomic_files import write_atomically
from evomoe_plugin.metrics.log import TrainingLog, parse_log
from study import results
from study.results import Result
from study.runs import Run
from study.systems import Study

_PR_SET_PDEATHSIG = 1
_TICKS = os.sysconf("SC_CLK_TCK")


# How a run ends whose logits (this package) or gradients (fairseq) are not finite.
_DIVERGED = re.compile(r"error: .*NaN/Inf|FloatingPointError")


class Locked(Exception):
    """Another process, such as a queue that was just killed, is training the run."""


class RunFolder:
    """The files of a run: its log, costs and checkpoints."""

    def __init__(self, run: Run, work: Path):
        self.path = work / "runs" / run.text / run.name
        self.log = self.path / "train.log"
        self.costs = self.path / "costs.jsonl"
        self._declared = self.path / "declared.json"
        self._lock = self.path / "lock"

    def lock(self) -> IO[str]:
        """Lock the folder; the lock ends once the file is closed in all processes that have it.

        Raises:
            Locked: another process has it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = open(self._lock, "w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise Locked from None
        return lock

    def is_locked(self) -> bool:
        if not self._lock.exists():
            return False
        try:
            self.lock().close()
        except Locked:
            return True
        return False

    def start_over_unless(self, declared: dict[str, Any]) -> None:
        """Delete what is left of a run of other settings or of another text."""
        with contextlib.suppress(FileNotFoundError):
            if json.loads(self._declared.read_text()) == declared:
                return
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path != self._lock:
                path.unlink()
        write_atomically(self._declared, json.dumps(declared))

    def read_costs(self) -> list[dict[str, Any]]:
        """The records of all attempts; of an attempt that was killed, the last may be cut."""
        found = []
        if self.costs.exists():
            for line in self.costs.read_text().splitlines():
                with contextlib.suppress(ValueError):
                    found.append(json.loads(line))
        return found

    def read_log(self) -> TrainingLog:
        if not self.log.exists():
            return TrainingLog(self.path.name)
        with open(self.log, errors="replace") as lines:
            return parse_log(lines, self.path.name)

    def update(self) -> int:
        """The last update in the log."""
        intervals = self.read_log().intervals
        return intervals[-1].update if intervals else 0

    def tail(self, lines: int = 5, width: int = 200) -> str:
        last = self.log.read_text(errors="replace").splitlines()[-lines:]
        return "\n".join(line[:width] for line in last)

    def remove_checkpoints(self) -> None:
        shutil.rmtree(self.path / "checkpoints", ignore_errors=True)


class Attempt:
    """A training process, which dies with this one.

    Its CPU time is read whenever it has written to its log, so that a killed queue loses the cost
    of one interval at most. An interval's own CPU time is that since the previous line of the log:
    start, evaluation and saving, which write lines, are not in it.
    """

    def __init__(self, run: Run, study: Study, work: Path, data: Path, fingerprint: str):
        """Lock the folder of the run.

        Raises:
            Locked: the run is being trained.
        """
        self.run, self._study, self._data = run, study, fingerprint
        self._process: subprocess.Popen | None = None
        self._diverged = False
        self.folder = RunFolder(run, work)
        self._lock = self.folder.lock()
        self.folder.start_over_unless({"settings": run.settings(study), "data": fingerprint})
        self._command = run.command(study, data, self.folder.path)
        before = self.folder.read_costs()
        self._number = 1 + max((cost["attempt"] for cost in before), default=0)
        self._costs = open(self.folder.costs, "a")
        self._costs.write("\n")  # the last record of a killed attempt may be cut
        self._output = open(self.folder.log, "ab")
        self._output.write(b"\n")
        self._output.flush()
        self._lines = open(self.folder.log, errors="replace")
        self._lines.seek(0, os.SEEK_END)
        self._log, self._line = TrainingLog(run.name), ""
        self._last_cpu, self._cpu = 0.0, 0.0

    def start(self) -> None:
        """Start the process."""
        self._start = time.monotonic()
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._record({"code": {**results.code_state(), "start": started}})
        self._process = subprocess.Popen(
            self._command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            pass_fds=[self._lock.fileno()],
            preexec_fn=_die_with(os.getpid()),
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(ROOT),
                "PYTHONWARNINGS": "ignore",
            },
        )

    def poll(self) -> int | None:
        """Measure what was logged since the last call; returns the exit status once it ended."""
        assert self._process is not None
        pid, status, used = os.wait4(self._process.pid, os.WNOHANG)
        self._cpu = used.ru_utime + used.ru_stime if pid else _cpu_seconds(self._process.pid)
        for part in self._lines:
            self._line += part
            if self._line.endswith("\n"):
                self._measure(self._line)
                self._line = ""
        if not pid:
            return None
        self._record({})
        self._process.returncode = os.waitstatus_to_exitcode(status)
        return self._process.returncode

    def result(self) -> Result | None:
        """The result, or None if the log is not complete."""
        return results.collect(
            self.run,
            self._study,
            self.folder.read_log(),
            self.folder.read_costs(),
            self._data,
            self._command,
            self._diverged,
        )

    def close(self) -> None:
        """End the process if it runs, and unlock the folder."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            while self.poll() is None:
                time.sleep(0.01)
        for file in (self._costs, self._output, self._lines, self._lock):
            file.close()

    def _measure(self, line: str) -> None:
        self._diverged |= _DIVERGED.match(line) is not None
        before = self._log.intervals[-1].update if self._log.intervals else None
        record = self._log.add(line)
        if record is not None:
            interval = self._study.log_interval
            after = record.update - interval if before is None else before
            cost = {"update": record.update, "after": after}
            self._record({**cost, "train_cpu": round(self._cpu - self._last_cpu, 3)})
        self._last_cpu = self._cpu

    def _record(self, values: dict[str, Any]) -> None:
        wall = time.monotonic() - self._start
        cost = {"attempt": self._number, "wall": round(wall, 2), "cpu": round(self._cpu, 2)}
        self._costs.write(json.dumps(cost | values) + "\n")
        self._costs.flush()


def _die_with(parent: int) -> Any:
    """A function for a forked child, after which it is killed when its parent ends."""
    libc = ctypes.CDLL(None, use_errno=True)

    def arrange() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return arrange


def _cpu_seconds(pid: int) -> float:
    """User and system time of a process that has not been waited for."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS
