"""The folder of experts beside a checkpoint: it goes where the checkpoint goes.

The experts of `X.pt` are in `X.experts/TAG/`, with a tag for each time that X was written. X names
the tag, so that writing X is what makes new experts count, and until then the old ones do.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection, Iterator

FOLDER = ".experts"
TEMPORARY = ".tmp"


def beside(path: str) -> str:
    """The folder of experts of the checkpoint that is, or will be, a file of this name."""
    return path.removesuffix(".pt") + FOLDER


def of(path: str) -> str:
    """The folder of experts of the checkpoint that is found under this name."""
    return beside(os.path.realpath(path))


def tags(path: str) -> list[str]:
    """The tags of experts beside a checkpoint of this name."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return sorted(os.listdir(beside(path)))
    return []


def keep_only(path: str, wanted: Collection[str]) -> None:
    """Remove experts beside `path` that do not belong to it any more."""
    for tag in tags(path):
        if tag not in wanted:
            shutil.rmtree(os.path.join(beside(path), tag))
    with contextlib.suppress(OSError):  # there is none, or it is not empty
        os.rmdir(beside(path))


def share(source: str, target: str) -> list[str]:
    """Give the experts of `source` to `target` too, beside those that it has.

    Returns:
        Their tags.
    """
    found = tags(source)
    for tag in found:
        folder = os.path.join(beside(target), tag)
        os.makedirs(folder, exist_ok=True)
        for entry in os.scandir(os.path.join(beside(source), tag)):
            _share_file(entry.path, os.path.join(folder, entry.name))
        sync_folder(folder)
        sync_folder(beside(target))
    return found


@contextlib.contextmanager
def follow(source: str, target: str) -> Iterator[None]:
    """Inside, `target` is made equal to `source`: experts come before, and old ones go after."""
    found = share(source, target)
    yield
    keep_only(target, found)


def _share_file(source: str, target: str) -> None:
    if os.path.exists(target) and os.path.samefile(source, target):
        return
    temporary = target + TEMPORARY
    with contextlib.suppress(FileNotFoundError):
        os.remove(temporary)
    try:
        os.link(source, temporary)
    except OSError:  # of another disk, or one without links
        shutil.copyfile(source, temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
    os.replace(temporary, target)


def sync_folder(path: str) -> None:
    """Have the disk know the names in a folder."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
