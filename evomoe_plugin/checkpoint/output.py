"""Where a verb writes: checked before it works, and written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

from evomoe_plugin.checkpoint.atomic_files import reason_of
from evomoe_plugin.checkpoint.expert_files import TEMPORARY
from evomoe_plugin.config.errors import OptionError, RunFailed


def check_output(option: str, path: str, *, overwrite: bool | None = None,
                 makes_folders: bool = False) -> None:
    """Raise `OptionError` unless a file or folder can be written at `path`.

    Args:
        option: what the user named it with, for messages.
        overwrite: whether a file that exists may be replaced; None: the verb has no such flag.
        makes_folders: whether the verb makes the folders above that are missing.
    """
    if os.path.lexists(path):
        is_file = os.path.isfile(path)
        if overwrite is not None and not is_file:
            raise OptionError(option, path, "exists already, and is no file")
        if not overwrite:
            remedy = "" if overwrite is None else ", or --overwrite"
            raise OptionError(option, path, f"exists already: give another path{remedy}")
    above = os.path.dirname(os.path.abspath(path))
    while makes_folders and not os.path.lexists(above):
        above = os.path.dirname(above)
    if not os.path.isdir(above):
        is_there = os.path.lexists(above)
        raise OptionError(option, path, f"{above} is no folder" if is_there
                          else f"there is no folder {above}")


def write_together(files: Mapping[str, Callable[[BinaryIO], Any]]) -> None:
    """Have each function write a file, and give all of them their names once all are whole.

    If one cannot be written, every path stays what it was. The folders exist.

    Raises:
        RunFailed: the disk is full or cannot be written; nothing stays behind.
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
    except (OSError, RuntimeError) as error:  # torch hides the reason in a RuntimeError
        raise RunFailed(f"cannot write {path}: {reason_of(error)}; nothing is changed") from error
    finally:
        for path in files:
            with contextlib.suppress(OSError):
                os.remove(path + TEMPORARY)
