"""Write, link and copy files so that a path holds the old content or the whole new one."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from evomoe_plugin.config.errors import RunFailed

TEMPORARY = ".tmp"


def write_files(
    files: Mapping[str, Callable[[BinaryIO], Any]], remark: str = "nothing is changed"
) -> None:
    """Have each function write a temporary file, then rename all of them.

    If one cannot be written, every path stays what it was. The folders exist.

    Args:
        remark: appended to the message, about what is left.
    Raises:
        RunFailed: the disk is full or cannot be written; no temporary file stays behind.
    """
    path = ""
    try:
        for path, write in files.items():
            with open(path + TEMPORARY, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
        for path in files:
            os.replace(path + TEMPORARY, path)
        remark = "the new file is whole, but a crash of the machine may undo it"
        for folder in {os.path.dirname(os.path.abspath(path)) for path in files}:
            sync(folder)
    except (OSError, RuntimeError) as error:
        free = shutil.disk_usage(os.path.dirname(os.path.abspath(path))).free
        raise RunFailed(
            f"cannot write {path}: {reason_of(error)} ({free / 2**20:.0f} MiB free); {remark}"
        ) from error
    finally:
        for path in files:
            with contextlib.suppress(OSError):
                os.remove(path + TEMPORARY)


def reason_of(error: BaseException) -> str:
    """Why the system refused to write; torch hides the OSError in a RuntimeError of its own."""
    system: BaseException | None = error
    while system is not None and not isinstance(system, OSError):
        system = system.__cause__ or system.__context__
    return (system and system.strerror) or str(error).split("\n")[0]


def link(name: str, path: str) -> None:
    """Make `path` a symbolic link to `name`, a file of the same folder."""
    _remove_temporary(path)
    os.symlink(name, path + TEMPORARY)
    os.replace(path + TEMPORARY, path)


def share(source: str, target: str) -> None:
    """Make `target` a hard link to `source`, or a copy where the disk has no links."""
    if os.path.exists(target) and os.path.samefile(source, target):
        return
    _remove_temporary(target)
    try:
        os.link(source, target + TEMPORARY)
    except OSError:
        shutil.copyfile(source, target + TEMPORARY)
        with open(target + TEMPORARY, "rb+") as file:
            os.fsync(file.fileno())
    os.replace(target + TEMPORARY, target)


def _remove_temporary(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.remove(path + TEMPORARY)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write one small file; text in UTF-8, with bytes of file names that are no text as escapes.

    Raises:
        OSError: it cannot be written; its `filename` is the path.
    """
    part = path.with_name(path.name + ".part")
    try:
        if isinstance(content, str):
            content = content.encode(errors="backslashreplace")
        part.write_bytes(content)
        rename(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def rename(part: Path, path: Path) -> None:
    """Flush a finished file to disk, then rename it to its final name."""
    sync(part)
    os.replace(part, path)


def sync(path: str | Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
