"""Progress output: a bar on a terminal, short lines in a pipe or a log."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TextIO

from rich import progress
from rich.console import Console

REFRESH_SECONDS = 0.1
REMIND_SECONDS = 30.0


class Progress:
    """Reports stages, one at a time, to `stream` (stderr)."""

    def __init__(self, stream: TextIO | None = None):
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()

    def say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[list[str]]:
        """A stage of `total` units. Text appended to the list is printed at the end."""
        message: list[str] = []
        self._name, self._done, self._total = name, 0, total
        started = self._shown = time.monotonic()
        # No refresh thread: worker processes are forked while a bar is shown.
        self._bar = progress.Progress(
            progress.SpinnerColumn(),
            progress.TextColumn(f"{name:<10}"),
            progress.BarColumn(),
            progress.TaskProgressColumn(),
            progress.TimeRemainingColumn(),
            transient=True,
            console=Console(file=self._stream),
            auto_refresh=False,
            disable=not self._terminal,
        )
        self._task = self._bar.add_task(name, total=total)
        with self._bar:
            yield message
        self.say(f"{name:<10} {' '.join(message)}  [{time.monotonic() - started:.1f} s]")

    def advance(self, units: int) -> None:
        self._done += units
        self.tick()

    def tick(self) -> None:
        """Refresh the bar, or print a reminder line."""
        now = time.monotonic()
        if now - self._shown < (REFRESH_SECONDS if self._terminal else REMIND_SECONDS):
            return
        self._shown = now
        self._bar.update(self._task, completed=self._done, refresh=True)
        if not self._terminal:
            share = f"{self._done / self._total:.0%}" if self._total else "running"
            self.say(f"{self._name:<10} … {share}")
