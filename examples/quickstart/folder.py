"""The folder of a run: its settings, and its lock."""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from commands import Refused
from recipe import Recipe

from evomoe_plugin.checkpoint.atomic_files import write_atomically
from evomoe_plugin.data import DataCard, PrepareOptions
from evomoe_plugin.data.sources import find_sources, inputs_difference

REMEDY = "give --fresh to delete it and start over, or --dir for another folder"


class RunFolder:
    """The files of a run."""

    def __init__(self, path: Path):
        self.path = path
        self.data = path / "data"
        self.checkpoints = path / "checkpoints"
        self.first = self.checkpoints / "checkpoint_first.pt"
        self.last = self.checkpoints / "checkpoint_last.pt"
        self.prepare_log = path / "prepare.log"
        self.train_log = path / "train.log"
        self.first_log = path / "eval-first.log"
        self.last_log = path / "eval-last.log"
        self.plot_log = path / "plot.log"
        self.picture = path / "run.png"
        self._settings = path / "settings.json"
        self._lock = path / ".lock"

    def _ours(self) -> list[Path]:
        return [
            self.data,
            self.path / ".data.preparing",
            self.path / ".data.replaced",
            self.checkpoints,
            self.prepare_log,
            self.train_log,
            self.first_log,
            self.last_log,
            self.plot_log,
            self.picture,
            self._settings,
        ]

    @contextlib.contextmanager
    def locked(self) -> Iterator[int]:
        """Lock out other quickstarts; yields the lock's file descriptor.

        Commands inherit the descriptor, so one that outlives this process keeps the lock.
        """
        if self.path.exists() and not self.path.is_dir():
            raise Refused(f"--dir {self.path} is a file; give a folder")
        foreign = (
            self.path.exists()
            and not self._settings.exists()
            and any(entry not in (self._lock, *self._ours()) for entry in self.path.iterdir())
        )
        if foreign:
            raise Refused(
                f"--dir {self.path} has files that are not of a quickstart; give another folder"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self._lock, "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Refused(
                    f"another quickstart is running in {self.path}; wait for it, or "
                    "give another folder with --dir"
                ) from None
            yield lock.fileno()

    def clear(self) -> None:
        """Delete the files of a quickstart, and nothing else."""
        for entry in self._ours():
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink(missing_ok=True)

    def claim(self, recipe: Recipe) -> None:
        """Record `recipe` in the folder; raises Refused if it has the run of another one."""
        settings = json.loads(
            json.dumps(  # tuples become lists, as in the file
                {"asked": recipe.asked, "prepare": recipe.prepare, "train": recipe.train}
            )
        )
        if not self._settings.exists():
            write_atomically(self._settings, json.dumps(settings, indent=1))
            return
        before = json.loads(self._settings.read_text())
        difference = (
            _difference(before["asked"], settings["asked"])
            or _difference(dict(before["train"]), dict(settings["train"]))
            or _difference(
                {"evomoe prepare": before["prepare"]}, {"evomoe prepare": settings["prepare"]}
            )
            or self._text_difference(recipe)
        )
        if difference:
            raise Refused(f"{self.path} has a run with other settings ({difference}); {REMEDY}")

    def _text_difference(self, recipe: Recipe) -> str | None:
        card = DataCard.load(self.data)
        if card is None:
            return None
        options = PrepareOptions(
            inputs=tuple(recipe.inputs),
            out=str(self.data),
            text_suffix=recipe.given("--text-suffix"),
            exclude=recipe.given("--exclude"),
        )
        difference = inputs_difference(card.inputs, card.files_not_read, find_sources(options))
        return f"of the text, {difference}" if difference else None

    def trained_updates(self) -> int:
        """Updates of the last checkpoint; 0 if there is none."""
        if not self.last.exists():
            return 0
        import torch

        try:
            state = torch.load(self.last, map_location="cpu", weights_only=False, mmap=True)
            return int(state["optimizer_history"][-1]["num_updates"])
        except Exception as error:  # damaged pickles raise many types
            raise Refused(f"{self.last} cannot be read ({error}); {REMEDY}") from error


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Describe the options that differ."""
    changed = [
        f"{name} {_shown(before.get(name))}, now {_shown(now.get(name))}"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]
    return "; ".join(changed) or None


def _shown(value: Any) -> str:
    if value in (None, False):
        return "not given"
    if value is True:
        return "given"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
