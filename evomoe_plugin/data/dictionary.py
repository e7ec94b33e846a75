"""Reading a fairseq dictionary that a user named."""

from __future__ import annotations

import os

from fairseq.data import Dictionary

from evomoe_plugin.config.errors import OptionError


def load_dictionary(option: str, path: str | os.PathLike[str]) -> Dictionary:
    """What `Dictionary.load` makes of a dict.txt.

    Args:
        option: what the user named the file, or its folder, with, for messages.
    Raises:
        OptionError: no such file, not UTF-8, a line that is not a symbol and its count, or a symbol
            twice.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise OptionError(option, path, "there is no such file")
    try:
        return Dictionary.load(path)
    except OSError as error:
        raise OptionError(option, path, f"cannot be read: {error.strerror}") from error
    except Exception as error:  # for text that is not UTF-8 fairseq raises just that
        raise OptionError(option, path, f"is no dictionary of fairseq: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    message = str(error).split(". ")[0]
    if message.startswith("Incorrect encoding"):
        return "it is not UTF-8"
    return " ".join(message.split())[:200]
