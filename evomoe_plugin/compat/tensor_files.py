"""Writing safetensors as they come: hashed on the way, never twice in memory."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import BinaryIO

import torch
from torch import Tensor

# https://github.com/huggingface/safetensors#format
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}
_PART = 2**24


def write_tensors(
    file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> tuple[int, str]:
    """Write `tensors`, whatever device they are on, as a file of safetensors.

    Returns:
        Its bytes, and its sha256 in hexadecimal digits.
    """
    header, end = {"__metadata__": dict(metadata)}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, total = hashlib.sha256(), 0

    def write(part) -> None:
        nonlocal total
        digest.update(part)
        file.write(part)
        total += len(part)

    write(len(text).to_bytes(8, "little"))
    write(text)
    for tensor in tensors.values():
        flat = tensor.detach().contiguous().view(-1).cpu()
        if flat.numel():
            bytes_ = memoryview(flat.view(torch.uint8).numpy())
            for start in range(0, len(bytes_), _PART):
                write(bytes_[start : start + _PART])
    return total, digest.hexdigest()


def sha256_of(path: str) -> str:
    """Of a file's bytes, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def num_bytes(shape: tuple[int, ...] | list[int], dtype: str) -> int:
    """Of a tensor, its dtype named as `dtype_name` does."""
    return math.prod(shape) * getattr(torch, dtype).itemsize


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` of `torch.float32`."""
    return str(dtype).removeprefix("torch.")
