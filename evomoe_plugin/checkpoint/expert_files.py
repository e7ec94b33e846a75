"""The folder of expert files beside a checkpoint, which goes where the checkpoint goes.

The experts of `X.pt` lie in `X.experts/TAG/`, with a tag for each time that X was written. X names
the tag: writing X is what makes new experts count, and until then the old ones do.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection, Iterator

from evomoe_plugin.checkpoint import atomic_files

FOLDER = ".experts"


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
    """Remove all tags beside `path` but the wanted ones."""
    for tag in tags(path):
        if tag not in wanted:
            shutil.rmtree(os.path.join(beside(path), tag))
    with contextlib.suppress(OSError):  # there is none, or it is not empty
        os.rmdir(beside(path))


def share(source: str, target: str) -> list[str]:
    """Link or copy the experts of `source` beside `target`, whose own ones stay.

    Returns:
        Their tags.
    """
    found = tags(source)
    for tag in found:
        folder = os.path.join(beside(target), tag)
        os.makedirs(folder, exist_ok=True)
        for entry in os.scandir(os.path.join(beside(source), tag)):
            atomic_files.share(entry.path, os.path.join(folder, entry.name))
        atomic_files.sync(folder)
        atomic_files.sync(beside(target))
    return found


@contextlib.contextmanager
def follow(source: str, target: str) -> Iterator[None]:
    """Inside, `target` is made equal to `source`: experts come before, old ones go after."""
    found = share(source, target)
    yield
    keep_only(target, found)
