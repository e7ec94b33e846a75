"""Progress output: a bar on a terminal, short lines in a pipe or a log."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TextIO

REFRESH_SECONDS = 0.1
REMIND_SECONDS = 30.0


class Progress:
    """Reports stages, one at a time, to `stream` (stderr)."""

    def __init__(self, stream: TextIO | None = None):
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._bars = None
        self._task = None
        self._shown = 0.0
        self._done, self._total = 0, None

    def say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[list[str]]:
        """A stage of `total` units. Text appended to the list is printed at the end."""
        message: list[str] = []
        started = time.monotonic()
        self._name, self._done, self._total, self._shown = name, 0, total, started
        with self._bar(name, total) if self._terminal else contextlib.nullcontext():
            yield message
        self.say(f"{name:<10} {' '.join(message)}  [{time.monotonic() - started:.1f} s]")

    def advance(self, units: int) -> None:
        self._done += units
        self.tick()

    def tick(self) -> None:
        """Refresh the bar, or print a reminder line."""
        now = time.monotonic()
        if self._bars is not None:
            if now - self._shown >= REFRESH_SECONDS:
                self._bars.update(self._task, completed=self._done, refresh=True)
                self._shown = now
        elif not self._terminal and now - self._shown >= REMIND_SECONDS:
            share = f"{self._done / self._total:.0%}" if self._total else "running"
            self.say(f"{self._name:<10} … {share}")
            self._shown = now

    @contextlib.contextmanager
    def _bar(self, name: str, total: int | None) -> Iterator[None]:
        from rich import progress
        from rich.console import Console

        # No refresh thread: worker processes are forked while a bar is shown.
        self._bars = progress.Progress(
            progress.SpinnerColumn(), progress.TextColumn(f"{name:<10}"), progress.BarColumn(),
            progress.TaskProgressColumn(), progress.TimeRemainingColumn(),
            console=Console(file=self._stream), transient=True, auto_refresh=False,
        )
        self._task = self._bars.add_task(name, total=total)
        try:
            with self._bars:
                yield
        finally:
            self._bars = None
