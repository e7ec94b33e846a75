"""Load a fairseq dictionary given by the user."""

from __future__ import annotations

import os

from fairseq.data import Dictionary

from evomoe_plugin.config.errors import OptionError


def load_dictionary(option: str, path: str | os.PathLike[str]) -> Dictionary:
    """Load a dict.txt with `Dictionary.load`.

    Args:
        option: the option that gave the file or its folder, for messages.
    Raises:
        OptionError: no such file, not UTF-8, a line that is not a token and its count, or a
            duplicate token.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise OptionError(option, path, "no such file")
    try:
        return Dictionary.load(path)
    except OSError as error:
        raise OptionError(option, path, f"cannot be read: {error.strerror}") from error
    except Exception as error:  # fairseq raises a bare Exception for text that is not UTF-8
        raise OptionError(option, path, f"is not a fairseq dictionary: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    message = str(error).split(". ")[0]
    if message.startswith("Incorrect encoding"):
        return "it is not UTF-8"
    return " ".join(message.split())[:200]
