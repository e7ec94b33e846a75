"""Write, copy and remove checkpoints on the disk, each with the expert files beside it."""

from __future__ import annotations

import contextlib
import os
import shutil
from typing import Any

import torch
from fairseq.file_io import PathManager

from evomoe_plugin.checkpoint import atomic_files, expert_files
from evomoe_plugin.checkpoint.atomic_files import TEMPORARY, write_files
from evomoe_plugin.checkpoint.expert_shards import manifest_of
from evomoe_plugin.checkpoint.load import load_file
from evomoe_plugin.config.errors import OptionError

_INTACT = "earlier checkpoints are intact, a run with the same --save-dir resumes from the last"


def save(state: Any, path: str) -> None:
    """Write a checkpoint's main file, whole or not at all.

    Raises:
        RunFailed: the disk is full or cannot be written.
    """
    if PathManager.path_requires_pathmanager(path):
        with PathManager.open(path, "wb") as file:
            torch.save(state, file)
    else:
        write_files({path: lambda file: torch.save(state, file)}, _INTACT)


def copy(source: str, target: str, symlink: bool = False) -> None:
    """Make the checkpoint `target` equal to `source`.

    Args:
        symlink: make it a relative link, where both lie in one folder.
    Raises:
        RunFailed: the disk is full or cannot be written.
    """
    if PathManager.path_requires_pathmanager(target):
        PathManager.copy(source, target, overwrite=True)
    elif symlink and os.path.dirname(source) == os.path.dirname(target):
        atomic_files.link(os.path.basename(source), target)
        expert_files.keep_only(target, ())
    else:
        with expert_files.follow(source, target), open(source, "rb") as original:
            write_files({target: lambda file: shutil.copyfileobj(original, file, 2**24)}, _INTACT)


def remove(path: str) -> None:
    """Remove a checkpoint, if it is there. The first link to it becomes the file itself."""
    if not os.path.lexists(path):
        if PathManager.exists(path):
            PathManager.rm(path)
        return
    if os.path.islink(path):
        os.remove(path)
        return
    folder, name = os.path.split(os.path.abspath(path))
    links = [
        entry.path
        for entry in os.scandir(folder)
        if entry.is_symlink() and os.readlink(entry.path) == name
    ]
    if not links:
        # If we are killed here, the next start removes the rest under this name.
        os.replace(path, path + TEMPORARY)
        expert_files.keep_only(path, ())
        os.remove(path + TEMPORARY)
        return
    with expert_files.follow(path, links[0]):
        os.replace(path, links[0])
    expert_files.keep_only(path, ())
    for link in links[1:]:
        atomic_files.link(os.path.basename(links[0]), link)


def remove_leftovers(folder: str) -> None:
    """Remove what a killed run left: half-written files, and expert files that no checkpoint names.

    Nobody else may write to the folder now. Nothing is removed beside a checkpoint that cannot be
    read.
    """
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except FileNotFoundError:
        return
    for entry in entries:
        if entry.name.startswith("checkpoint") and entry.name.endswith(".pt" + TEMPORARY):
            path = entry.path.removesuffix(TEMPORARY)
            if not os.path.lexists(path):
                expert_files.keep_only(path, ())
            os.remove(entry.path)
    for entry in entries:
        if entry.name.endswith(expert_files.FOLDER):
            path = entry.path.removesuffix(expert_files.FOLDER) + ".pt"
            with contextlib.suppress(OSError, OptionError), open(path, "rb") as file:
                # Memory-mapped, so that only the manifest is read.
                state = load_file(file, map_location="cpu", mapped=True, tensors=False)
                manifest = manifest_of(state, path)
                expert_files.keep_only(path, [manifest.tag] if manifest else [])
