"""Faults at a chosen moment: of the disk, or the death of a process.

A moment is a number: of an operation that changes files of a folder, or of a call of a Python
function. Both are counted in each rank from the start of a run, so that a seed always means the
same moment.
"""

from __future__ import annotations

import builtins
import ctypes
import errno
import io
import mmap
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MOST_RANKS = 8

# Of os, with the index of the argument that names what changes.
_OPERATIONS = {
    "replace": 1,
    "rename": 1,
    "link": 1,
    "symlink": 1,
    "remove": 0,
    "unlink": 0,
    "mkdir": 0,
    "rmdir": 0,
    "fsync": 0,
}


class Counters:
    """A number for each rank, in memory that forked ranks share."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8 * MOST_RANKS)
        self._counts = (ctypes.c_long * MOST_RANKS).from_buffer(self._memory)

    def add(self, rank: int) -> int:
        """Count one, and return how many there are."""
        self._counts[rank] += 1
        return self._counts[rank]

    def values(self) -> list[int]:
        """Of each rank."""
        return list(self._counts)


@dataclass(frozen=True)
class Kill:
    """SIGKILL at an operation of the disk, in the middle of it where it can be.

    Attributes:
        at: its number, from 1.
        rank: whose.
        everyone: kill all ranks and what started them; else only this one.
    """

    at: int
    rank: int = 0
    everyone: bool = False

    def strike(self, name: str, perform: Callable[[], Any], half: Callable[[], Any] | None) -> Any:
        if half is not None:
            half()
        kill(self.everyone)

    def is_struck(self, number: int, name: str) -> bool:
        return number == self.at


@dataclass(frozen=True)
class Error:
    """An error of the system from an operation of the disk on.

    Attributes:
        at, rank: as of `Kill`.
        number: of the error, as `errno.ENOSPC`.
        operations: names of those that fail; empty: all but removals.
        lasting: fail from then on; else once, at the first of those from then on.
        struck: how often it did, by rank.
    """

    at: int
    rank: int
    number: int
    operations: tuple[str, ...] = ()
    lasting: bool = True
    struck: Counters = field(default_factory=Counters)

    def strike(self, name: str, perform: Callable[[], Any], half: Callable[[], Any] | None) -> Any:
        self.struck.add(self.rank)
        if half is not None:
            half()
        raise OSError(self.number, os.strerror(self.number))

    def is_struck(self, number: int, name: str) -> bool:
        if number < self.at or (not self.lasting and self.struck.values()[self.rank]):
            return False
        if self.operations:
            return name in self.operations
        return name not in ("remove", "unlink", "rmdir") or self.number == errno.EROFS


@dataclass(frozen=True)
class Slow:
    """Each operation of the disk takes some seconds more."""

    seconds: float
    rank: int = 0

    def strike(self, name: str, perform: Callable[[], Any], half: Callable[[], Any] | None) -> Any:
        time.sleep(self.seconds)
        return perform()

    def is_struck(self, number: int, name: str) -> bool:
        return True


def kill(everyone: bool) -> None:
    """End this process, or its group, as `kill -9` does."""
    if everyone:
        os.killpg(0, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def rank() -> int:
    """Of this process; 0 before there are ranks."""
    import torch.distributed as dist

    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def watch_disk(folder: Path, fault: Kill | Error | Slow | None, counts: Counters) -> None:
    """Count what changes files under `folder`, in this process and those it forks, and strike."""
    root = os.path.realpath(folder) + os.sep

    def around(
        name: str, path: Any, perform: Callable[[], Any], half: Callable[[], Any] | None = None
    ) -> Any:
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        if not os.path.abspath(os.fspath(path)).startswith(root):
            return perform()
        own = rank()
        number = counts.add(own)
        if fault is not None and own == fault.rank and fault.is_struck(number, name):
            return fault.strike(name, perform, half)
        return perform()

    for name, index in _OPERATIONS.items():
        _wrap_operation(name, index, around)
    _wrap_open(around)
    _wrap_safetensors(around)


def _wrap_operation(name: str, index: int, around: Callable) -> None:
    original = getattr(os, name)

    def operation(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("dir_fd") is not None:  # of shutil.rmtree, by its folder's descriptor
            folder = os.readlink(f"/proc/self/fd/{kwargs['dir_fd']}")
            path: Any = os.path.join(folder, os.fspath(args[index]))
        else:
            path = args[index]
        return around(name, path, lambda: original(*args, **kwargs))

    setattr(os, name, operation)


def _wrap_open(around: Callable) -> None:
    original = builtins.open

    class Writer(io.BufferedWriter):
        """A file to write to, every write of which may fail half-way."""

        def write(self, data: Any) -> int:
            data = memoryview(data).cast("B")

            def half() -> None:
                super(Writer, self).write(data[: len(data) // 2])
                super(Writer, self).flush()

            return around("write", self.name, lambda: super(Writer, self).write(data), half)

    def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if isinstance(file, int) or not {"w", "x", "a"}.intersection(mode):
            return original(file, mode, *args, **kwargs)
        if mode != "wb":
            return around("open", file, lambda: original(file, mode, *args, **kwargs))
        return around("open", file, lambda: Writer(io.FileIO(file, "w")))

    builtins.open = opened
    io.open = opened  # of pathlib


def _wrap_safetensors(around: Callable) -> None:
    """It writes in Rust."""
    from evomoe_plugin.checkpoint import tensor_files

    original = tensor_files.save_file

    def save_file(tensors: Any, path: str, *args: Any) -> None:
        def half() -> None:
            original(tensors, path, *args)
            os.truncate(path, os.path.getsize(path) // 2)

        around("write", path, lambda: original(tensors, path, *args), half)

    tensor_files.save_file = save_file


def watch_calls(at: int | None, of_rank: int, everyone: bool, counts: Counters) -> None:
    """Count calls of Python functions once a run has its trainer, in all threads; kill at one."""
    from evomoe_plugin.trainer.moe_trainer import MoETrainer

    begin = MoETrainer.__init__

    def init(trainer: Any, *args: Any, **kwargs: Any) -> None:
        begin(trainer, *args, **kwargs)
        own = rank()

        def profile(_frame: Any, event: str, _arg: Any) -> None:
            if event == "call" and counts.add(own) == at and own == of_rank:
                kill(everyone)

        threading.setprofile(profile)
        sys.setprofile(profile)

    MoETrainer.__init__ = init
