"""The folder that is written: complete under its name, or not there at all.

All work is done in a hidden folder beside it, `.NAME.preparing`, which one process at a time may
use; only a finished set is renamed to NAME. An older set makes way as `.NAME.replaced`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from evomoe_plugin.config.errors import OptionError, RunFailed
from evomoe_plugin.data.card import DataCard
from evomoe_plugin.data.files import sync
from evomoe_plugin.data.staging import STAGED

LOCK_SECONDS = 2.0  # the workers of a killed run, which hold its lock, end sooner


class OutputFolder:
    """`path` is the folder's final name, `data` where it is built, `work` what is needed for it."""

    def __init__(self, path: str):
        self.path = Path(os.path.realpath(path))
        self.work = self.path.with_name(f".{self.path.name}.preparing")
        self.data = self.work / "data"
        self._replaced = self.path.with_name(f".{self.path.name}.replaced")
        self._lock = self.work / "lock"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other process out, and put right what a killed one has left."""
        if self.path.exists() and not self.path.is_dir():
            raise OptionError("out", self.path, "is a file; name a folder")
        self.work.mkdir(parents=True, exist_ok=True)
        with open(self._lock, "w") as lock:
            if not _lock(lock):
                raise RunFailed(f"another evomoe prepare is writing {self.path}")
            if self._replaced.exists():
                if self.path.exists():
                    shutil.rmtree(self._replaced)
                else:
                    self._replaced.rename(self.path)
            yield

    def card(self) -> DataCard | None:
        """The card of the complete set that stands there, if one does.

        Raises OptionError if something else does, which must never be replaced.
        """
        card = DataCard.load(self.path)
        if card is None and self.path.exists() and any(self.path.iterdir()):
            raise OptionError("out", self.path, "is not empty, and evomoe prepare did not write "
                              "it; name another folder")
        return card

    def start(self) -> None:
        """Begin afresh."""
        for entry in self.work.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry != self._lock:
                entry.unlink()
        self.data.mkdir()

    def can_continue(self) -> bool:
        """Whether there is work worth keeping after an interruption."""
        return (self.work / STAGED).exists()

    def publish(self) -> None:
        """Give the finished folder its name; an older one is removed only then."""
        for entry in [*self.data.iterdir(), self.data]:
            sync(entry)
        if self.path.exists():
            self.path.rename(self._replaced)
        self.data.rename(self.path)
        sync(self.path.parent)
        if self._replaced.exists():
            shutil.rmtree(self._replaced)
        self.discard()

    def discard(self) -> None:
        """Remove the work."""
        shutil.rmtree(self.work, ignore_errors=True)


def _lock(stream: TextIO) -> bool:
    until = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > until:
                return False
            time.sleep(0.1)
