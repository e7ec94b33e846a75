"""Reading safetensors, whose files hold nothing that can run."""

from __future__ import annotations

import os

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from evomoe_plugin.options import OptionError


def read_safetensors(option: str, path: str) -> dict[str, Tensor]:
    """All tensors of a file, by name.

    Args:
        option: what the user named the file with, for messages.
    Raises:
        OptionError: no such file, cut short, or not of this format.
    """
    if not os.path.isfile(path):
        raise OptionError(option, path, "there is no such file")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise OptionError(option, path,
                          f"is no file of safetensors, or cut short ({error})") from error
