"""Read and write safetensors files."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from evomoe_plugin.config.errors import OptionError


def write_tensors(path: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write `tensors`, on any device, to a safetensors file.

    Raises:
        OSError: it cannot be written.
    """
    try:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, path, dict(metadata)
        )
    except SafetensorError as error:
        raise OSError(0, str(error)) from error


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
        raise OptionError(
            option, path, f"is no file of safetensors, or cut short ({error})"
        ) from error


def num_bytes(shape: tuple[int, ...] | list[int], dtype: str) -> int:
    """The size of a tensor whose dtype has the name that `dtype_name` gives."""
    return math.prod(shape) * getattr(torch, dtype).itemsize


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` of `torch.float32`."""
    return str(dtype).removeprefix("torch.")
