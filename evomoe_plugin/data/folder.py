"""The output folder: complete or absent.

Work is done in a hidden sibling folder, `.NAME.preparing`, locked by one process; only a complete
data set is renamed to NAME. An older one is first renamed to `.NAME.replaced`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from evomoe_plugin.checkpoint.atomic_files import sync
from evomoe_plugin.config.errors import OptionError, RunFailed
from evomoe_plugin.data.card import DataCard

LOCK_SECONDS = 2.0  # the workers of a killed run, which hold its lock, exit sooner


class OutputFolder:
    """`path` is the final name, `data` the data set being built, `work` the temporary folder."""

    def __init__(self, path: str):
        self.path = Path(os.path.realpath(path))
        if not self.path.name:
            raise OptionError("out", path, "is the root of the disk; name a folder in it")
        self.work = self.path.with_name(f".{self.path.name}.preparing")
        self.data = self.work / "data"
        self._replaced = self.path.with_name(f".{self.path.name}.replaced")
        self._lock = self.work / "lock"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock out other processes, and undo an interrupted replacement."""
        if self.path.exists() and not self.path.is_dir():
            raise OptionError("out", self.path, "is a file; give a folder")
        self.work.mkdir(parents=True, exist_ok=True)
        with open(self._lock, "w") as lock:
            until = time.monotonic() + LOCK_SECONDS
            while not _locks(lock):
                if time.monotonic() > until:
                    raise RunFailed(f"another evomoe prepare is writing {self.path}")
                time.sleep(0.1)
            if self._replaced.exists():
                if self.path.exists():
                    shutil.rmtree(self._replaced)
                else:
                    self._replaced.rename(self.path)
            yield

    def card(self) -> DataCard | None:
        """The card of the existing data set, if there is one.

        Raises OptionError for any other non-empty folder, which must not be replaced.
        """
        card = DataCard.load(self.path)
        if card is None and self.path.exists() and any(self.path.iterdir()):
            fault = "is not empty, and was not written by evomoe prepare; give another folder"
            raise OptionError("out", self.path, fault)
        return card

    def prepared(
        self, overwrite: bool, difference: Callable[[DataCard], str | None]
    ) -> DataCard | None:
        """The card of the existing data set if it is what would be written; None: write it.

        Args:
            overwrite: whether another data set may be replaced.
            difference: names the first input or option in which a card differs.
        Raises:
            OptionError: it is another one, or damaged; or as `card`.
        """
        card = self.card()
        if card is None or overwrite:
            return None
        if found := difference(card):
            fault = f"contains a data set with other inputs or options ({found})"
        elif damaged := card.damage(self.path):
            fault = f"its {damaged} does not match the data card"
        else:
            self.discard()
            return card
        raise OptionError("out", self.path, f"{fault}; pass --overwrite to replace it")

    def start(self) -> None:
        """Delete all work and start over."""
        for entry in self.work.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry != self._lock:
                entry.unlink()
        self.data.mkdir()

    def publish(self) -> None:
        """Rename the finished data set to its final name, then remove an older one.

        An older one that cannot be replaced stays what it was.
        """
        for entry in [*self.data.rglob("*"), self.data]:
            sync(entry)
        if self.path.exists():
            self.path.rename(self._replaced)
        try:
            self.data.rename(self.path)
            sync(self.path.parent)
        except OSError:
            if self.path.exists():
                self.path.rename(self.data)
            if self._replaced.exists():
                self._replaced.rename(self.path)
            raise
        if self._replaced.exists():
            shutil.rmtree(self._replaced)
        self.discard()

    def discard(self) -> None:
        """Remove the temporary folder."""
        shutil.rmtree(self.work, ignore_errors=True)


def _locks(stream: TextIO) -> bool:
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False
