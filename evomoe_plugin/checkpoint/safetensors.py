"""Reading safetensors: a header in JSON, then the bytes of the tensors; nothing that can run.

Format: https://github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
import math
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evomoe_plugin.options import OptionError

_MOST_HEADER_BYTES = 100_000_000  # the format's own limit
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}


def read_safetensors(option: str, path: str) -> dict[str, Tensor]:
    """All tensors of a file, by name.

    Args:
        option: what the user named the file with, for messages.
    Raises:
        OptionError: no such file, cut short, or not of this format.
    """
    if not os.path.isfile(path):
        raise OptionError(option, path, "there is no such file")
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MOST_HEADER_BYTES):
            raise OptionError(option, path, "is no file of safetensors, or cut short")
        try:
            header = json.loads(file.read(length))
            entries = {name: _entry(entry, size - 8 - length)
                       for name, entry in header.items() if name != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise OptionError(option, path, "is no file of safetensors, or cut short "
                                            f"({error})") from error
    data = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + length) if entries and (
        size > 8 + length) else np.zeros(0, dtype=np.uint8)
    return {name: _tensor(data, *entry) for name, entry in entries.items()}


def _entry(entry: dict[str, Any], size: int) -> tuple[torch.dtype, list[int], int, int]:
    """dtype, shape, first byte and the one after the last; ValueError unless they fit."""
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"tensors of type {entry['dtype']} are not known here")
    dtype, shape, (begin, end) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)):
        raise ValueError("sizes are not numbers")
    if not begin <= end <= size or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError("a tensor's bytes are not all there")
    return dtype, shape, begin, end


def _tensor(data: np.ndarray, dtype: torch.dtype, shape: list[int], begin: int,
            end: int) -> Tensor:
    flat = torch.from_numpy(np.array(data[begin:end]))  # a copy: the file may be closed
    return (flat.view(dtype) if flat.numel() else torch.empty(0, dtype=dtype)).view(shape)
