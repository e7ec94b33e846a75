"""Check a verb's output paths before it works."""

from __future__ import annotations

import os

from evomoe_plugin.config.errors import OptionError


def check_output(
    option: str, path: str, *, overwrite: bool | None = None, makes_folders: bool = False
) -> None:
    """Raise `OptionError` unless a file or folder can be written at `path`.

    Args:
        option: the option that named it, for messages.
        overwrite: whether an existing file may be replaced; None: the verb has no such flag.
        makes_folders: whether the verb creates missing parent folders.
    """
    if os.path.lexists(path):
        is_file = os.path.isfile(path)
        if overwrite is not None and not is_file:
            raise OptionError(option, path, "exists already, and is no file")
        if not overwrite:
            remedy = "" if overwrite is None else ", or --overwrite"
            raise OptionError(option, path, f"exists already: give another path{remedy}")
    parent = os.path.dirname(os.path.abspath(path))
    while makes_folders and not os.path.lexists(parent):
        parent = os.path.dirname(parent)
    if not os.path.isdir(parent):
        raise OptionError(
            option,
            path,
            f"{parent} is no folder" if os.path.lexists(parent) else f"there is no folder {parent}",
        )
