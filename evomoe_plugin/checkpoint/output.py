"""Check where a verb is to write, before it works."""

from __future__ import annotations

import os

from evomoe_plugin.config.errors import OptionError


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
