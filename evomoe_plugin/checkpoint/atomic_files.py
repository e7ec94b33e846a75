"""Files that are whole or absent: what a checkpoint is written, copied, linked and removed with."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, BinaryIO

import torch
from fairseq.file_io import PathManager

from evomoe_plugin.checkpoint import expert_files
from evomoe_plugin.checkpoint.expert_files import TEMPORARY, sync_folder
from evomoe_plugin.config.errors import RunFailed

# Whether the checkpoint being saved in this thread links its other names to its first.
_symlink: ContextVar[bool] = ContextVar("symlink", default=False)


@contextlib.contextmanager
def linking(symlink: bool) -> Iterator[None]:
    """Inside, `CheckpointFiles.copy` makes relative links if `symlink`."""
    token = _symlink.set(symlink)
    try:
        yield
    finally:
        _symlink.reset(token)


def write_whole(path: str, write: Callable[[BinaryIO], Any]) -> None:
    """Have `write` fill a temporary file, then give it the name `path`.

    Whatever happens, and whenever, `path` is what it was or the whole new file.

    Raises:
        RunFailed: the disk is full or cannot be written; the temporary file is gone.
    """
    temporary = path + TEMPORARY
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(os.path.dirname(os.path.abspath(path)))
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        # torch hides the reason of a failed write in a RuntimeError of its own.
        if isinstance(error, (OSError, RuntimeError)):
            raise RunFailed(_told(path, error)) from error
        raise


def reason_of(error: BaseException) -> str:
    """Why the system refused to write, in its words; torch hides it in an error of its own."""
    system: BaseException | None = error
    while system is not None and not isinstance(system, OSError):
        system = system.__cause__ or system.__context__
    return (system and system.strerror) or str(error).split("\n")[0]


def _told(path: str, error: Exception) -> str:
    free = shutil.disk_usage(os.path.dirname(os.path.abspath(path))).free
    return (f"cannot write {path}: {reason_of(error)} ({free / 2**20:.0f} MiB free); "
            "earlier checkpoints are intact, a run with the same --save-dir resumes from the last")


def save(obj: Any, filename: str, async_write: bool = False) -> None:
    """In place of `checkpoint_utils.torch_persistent_save`.

    `async_write` is not heeded: who wants it calls this in the background.
    """
    if PathManager.path_requires_pathmanager(filename):
        with PathManager.open(filename, "wb") as file:
            torch.save(obj, file)
    else:
        write_whole(filename, lambda file: torch.save(obj, file))


class CheckpointFiles(PathManager):
    """fairseq's `PathManager`, as `checkpoint_utils` shall see it."""

    @staticmethod
    def copy(source: str, target: str, overwrite: bool = False) -> bool:
        """Make `target` equal to `source`, by a copy or, inside `linking(True)`, by a link."""
        if PathManager.path_requires_pathmanager(target):
            return PathManager.copy(source, target, overwrite=overwrite)
        if _symlink.get() and os.path.dirname(source) == os.path.dirname(target):
            _link(os.path.basename(source), target)
            expert_files.keep_only(target, ())
        else:
            with expert_files.follow(source, target), open(source, "rb") as original:
                write_whole(target, lambda file: shutil.copyfileobj(original, file, 2**24))
        return True


def _link(name: str, path: str) -> None:
    temporary = path + TEMPORARY
    with contextlib.suppress(FileNotFoundError):
        os.remove(temporary)
    os.symlink(name, temporary)
    os.replace(temporary, path)


def remove(path: str) -> None:
    """Remove a checkpoint that is no longer to be kept; a link to it becomes the file itself."""
    folder, name = os.path.split(os.path.abspath(path))
    if os.path.islink(path):
        os.remove(path)
        return
    links = [
        entry.path for entry in os.scandir(folder)
        if entry.is_symlink() and os.readlink(entry.path) == name
    ]
    if not links:
        # Under this name it is finished off at the next start, if we are killed here.
        os.replace(path, path + TEMPORARY)
        expert_files.keep_only(path, ())
        os.remove(path + TEMPORARY)
        return
    with expert_files.follow(path, links[0]):
        os.replace(path, links[0])
    expert_files.keep_only(path, ())
    for link in links[1:]:
        _link(os.path.basename(links[0]), link)


def remove_leftovers(folder: str) -> None:
    """Remove what a killed process left half-written. Nobody else may write there now."""
    with contextlib.suppress(FileNotFoundError):
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if entry.name.startswith("checkpoint") and entry.name.endswith(".pt" + TEMPORARY):
                path = entry.path.removesuffix(TEMPORARY)
                if not os.path.lexists(path):
                    expert_files.keep_only(path, ())
                os.remove(entry.path)
